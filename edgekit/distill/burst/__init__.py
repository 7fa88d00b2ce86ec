"""Distillation in bursts, on a GPU that is there for minutes at a time and has no network.

The far machine needs Linux, Python, torch and numpy (and Triton on a GPU); what else the training
imports travels along. Nothing that is moved at once is larger than a part, and what comes back lies
in files of at most 16 MiB. Any step may be killed and given again.

Here: a folder with `burst.pyz` (edgekit and what is to be done) and `part-1.zip` ... of at most
60 MiB. What follows `--` are the arguments of `edgekit distill`, the source first:

    python -m edgekit.distill.burst pack BURST --python 3.12 -- smollm2-135m-instruct \
      -o students/lawcat --recipe general --precision bf16 --data train/*.txt talk.jsonl \
      --held-out heldout/emma.txt --evaluate-tokens 2000000 --checkpoint-seconds 60

There: parts are received in as many calls as it takes, and the last call trains. WORK keeps what
was received, so where it survives, the next burst needs `burst.pyz` alone:

    python3 BURST/burst.pyz WORK BURST/part-1.zip
    python3 BURST/burst.pyz WORK BURST/part-2.zip BURST/part-3.zip --out OUT --seconds 500

Here again: OUT becomes STUDENT.run, or STUDENT if the training came to its end. `edgekit distill
--resume` goes on with the run as with any other, and so does the same `pack`: it writes anew only
the parts that changed, which are the last.

    python -m edgekit.distill.burst collect OUT -o students/lawcat

After --seconds the run saves itself, which takes a few more; after --grace more it is killed, and
its last checkpoint counts. A batch system runs the middle step as its job.
"""
