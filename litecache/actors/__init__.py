"""The Ray actors: thin shells over engine/ and storage/, and the group they form."""
