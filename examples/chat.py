"""Chat by the model's own template: one answer, several conversations at once, and a session.

    python examples/chat.py [--model NAME] [--group GROUP]

Each turn of a session finds the turns before it in the cache, the answers' own tokens included.
"""

from __future__ import annotations

from example_options import options, parse

from litecache import KVCacheAdapter

SYSTEM = "You are the keeper of a tide mill, and you answer in one sentence."
TURNS = ("Where does your mill take its power from?", "And when does it stand still?", "Thank you.")


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def main() -> None:
    args = parse(options(__doc__))
    with KVCacheAdapter(args.model, group=args.group) as llm:
        reply = llm.chat(user("Name the largest ocean."), max_new_tokens=24, do_sample=False)
        print(f"answer: {reply.text!r} ({reply.finish_reason})")

        questions = [user("Name a river."), user("Name a mountain."), user("Name a desert.")]
        for each in llm.chat(questions, max_new_tokens=12, do_sample=False):
            print(f"of a batch: {each.text!r}")

        session = llm.session(SYSTEM, max_new_tokens=32, do_sample=False)
        for turn in TURNS:
            print(f"> {turn}")
            stream = session.send(turn, stream=True)
            for text in stream:
                print(text, end="", flush=True)
            usage = stream.reply.usage
            cached = sum(usage.cached_tokens.values())
            print(f"\n  {cached} of {usage.prompt_tokens} prompt tokens were reused")
        print(f"{len(session.messages)} messages in the session")


if __name__ == "__main__":
    main()
