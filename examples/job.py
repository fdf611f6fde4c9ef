"""A Ray job that shares a group of actors with other jobs, notebooks and drivers.

    ray job submit --working-dir . -- python examples/job.py       # in the clone
    python examples/job.py                                         # the same as a driver

Whoever comes first starts the group, the others join it; it stays when they end, and so does what
they have computed: every further run finds the introduction and computes its own question alone.

    litecache status --group jobs
    litecache down --group jobs
"""

from __future__ import annotations

from example_options import options, parse

from litecache import KVCacheAdapter

INTRODUCTION = (
    "A tide mill takes its power from the sea. At flood the water opens a gate and fills a pond; "
    "at ebb the gate falls shut, and the pond drives the wheel until the next flood. "
)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--question", default="The keeper of the mill", help="what to go on from")
    args = parse(parser)
    # Detached: it outlives this job. `storage_dir` would have to be absolute, since a job's own
    # working directory is thrown away.
    with KVCacheAdapter(args.model, group=args.group or "jobs", detached=True) as llm:
        inputs = llm.tokenizer(INTRODUCTION + args.question, return_tensors="pt")
        out = llm.generate(
            **inputs, max_new_tokens=16, do_sample=False, return_dict_in_generate=True
        )
        new = out.sequences[0, inputs.input_ids.shape[1] :]
        print(f"{args.question}{llm.tokenizer.decode(new)}")
        reused = sum(out.litecache.reused_tokens[0].values())
        print(f"{reused} of {inputs.input_ids.shape[1]} prompt tokens were found")
        print(f"group {llm.group.spec.group!r} stays for others")


if __name__ == "__main__":
    main()
