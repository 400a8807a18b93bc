"""The training layer: a YAML file in, an adapter out, with `transformers.Trainer` as the loop.

    from pyfinetune.train.config import load_config
    from pyfinetune.train.run import train

    result = train(load_config("run.yaml"))

Read in this order: `sources`, `config`, `data`, `formats`, `tasks`, `cleaning`, `splits`, `mixing`, `tokenizing`,
`packing`, `reading`, `preflight`, `model`, `schedules`, `loop`, `callbacks`, `checkpoints`, `manifest`, `run`; then
what a run leaves for people (`answers`, `curves`, `html_report`, `card`), and what builds on it (`repeat`, `search`).
`planning` and `forecast` predict what a run takes.
"""
