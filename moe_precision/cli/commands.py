"""The commands by name and what each does, known without importing any of them."""

from __future__ import annotations

SUMMARIES = {
    "fit": (
        "Train a recipe with the callback, by LightningCLI: any key of the YAML is an option, --print_config prints "
        "the whole configuration, and --trainer.callbacks.help RouterNormMonitor explains the callback. --config "
        "takes a file, or the name of a recipe that comes with the package."
    ),
    "plan": (
        "Make a plan without training again: with other bits from the norms that a run recorded, or from two "
        "checkpoints, before and after a fine-tuning that was not recorded. Checkpoints are read tensor by tensor."
    ),
    "show": (
        "Print the bits of every expert as a table, from a plan or from a checkpoint that AutoRound, GPTQModel, "
        "llm-compressor or moe-precision quantized; with --diff, print where two of them differ."
    ),
    "report": (
        "Write a run as one HTML page that needs no network: router norms by layer, their change against load and "
        "curvature, the bits of every expert, when the plan settled, results of compare, and what to type next."
    ),
    "compare": (
        "Judge every method on your own model, at each budget and equal stored bits, by the loss on held-out text, "
        "with intervals, random draws and the tail. Says in plain words which plan to use, and can write it."
    ),
    "estimate": (
        "Say what a model takes, from its config.json alone: GiB of its experts, of the rest and in total at uniform "
        "widths and at budgets, what fits a size, and the memory and files of recording statistics and of quantizing."
    ),
    "quantize": (
        "Quantize a float checkpoint by a plan, one shard at a time, so that the model may be larger than memory; OUT"
        " loads with from_pretrained after `import moe_precision`. An interrupted run resumes when it is started "
        "again. Under torchrun, on one machine or several, each process packs its part of the files."
    ),
    "prune": (
        "Write a float checkpoint without the experts that a plan drops (0 bits), rows of the router cut: stock "
        "transformers loads it. Every layer keeps as many. The whole float model must fit in memory."
    ),
    "dequantize": (
        "Write a packed checkpoint as a float one, with the values that its packed weights stand for: it needs no "
        "moe-precision, and is as large as the float model was. The whole float model must fit in memory."
    ),
    "export": (
        "Print a plan as the config of another quantizer (docs/export.md shows how to use each). Widths that it does "
        "not have are rounded up, with a note; a plan that it cannot carry out is an error."
    ),
    "evaluate": (
        "Loss and perplexity of a float or packed checkpoint, overall and on the rarest tenth of target tokens, in "
        "blocks of 256 tokens (the demo uses blocks of 128, so its numbers differ). With --reference also how far it "
        "is from the float model: KL divergence (mean, 99th and 99.9th percentile over tokens), the share of tokens "
        "with the same most likely next token, and the share that goes to the same experts in every layer."
    ),
    "serve": (
        "Serve a packed checkpoint by OpenAI's API: by vLLM if it is installed, else by transformers. What follows the "
        "folder goes to the engine's own server; the command that it becomes is printed."
    ),
    "workspace": (
        "Save a view in a Weights & Biases project with panels for what the callbacks log: the plan, the router norms "
        "of every expert by layer, and the load."
    ),
    "doctor": (
        "Check this machine: versions, the C++ compiler, every kernel by a product whose result is known, and why one "
        "is not there; optional packages and what they are for. The exit status is 1 if something is broken, or absent "
        "and required."
    ),
    "demo": "Train a small Mixtral, make its plan, quantize, reload and compare; minutes on two CPU cores.",
}
"""Command -> its help. Each command is the module of its name, imported when it is used."""
