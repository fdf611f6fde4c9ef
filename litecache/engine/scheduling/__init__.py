"""What each step computes and which blocks it uses: the one owner of block references."""
