"""Two processes hold half of each frozen matrix, and compute what one computes with the whole."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn

from edgekit.distill.sharding import place_unsharded, shard_frozen
from edgekit.distill.build import student_over
from edgekit.models.decoder import Decoder
from edgekit.sources import open_source

source = open_source(sys.argv[1])
teacher = Decoder.from_store(source.config, source.weights)
config = source.config.with_mixers(("lawcat",) * source.config.num_layers)
student = student_over(teacher, config)
ids = torch.arange(70)[None] % source.config.vocab_size
with torch.no_grad():
    wanted = [decoder(ids)[0] for decoder in (teacher, student)]

dist.init_process_group("gloo")
cpu = torch.device("cpu")
place_unsharded(teacher, cpu)
shard_frozen(teacher, student, cpu, dist.get_world_size())
names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
spread = [m for n, m in teacher.named_modules() if n.rpartition(".")[2] in names]
assert len(spread) == 7 * source.config.num_layers
for linear in spread:
    assert 2 * linear.weight.to_local().numel() == linear.weight.numel(), linear
own = {id(m) for m in student.modules() if isinstance(m, nn.Linear)}
assert {id(linear) for linear in spread} <= own
with torch.no_grad():
    for decoder, logits in zip((teacher, student), wanted, strict=True):
        torch.testing.assert_close(decoder(ids)[0], logits)
assert all(2 * linear.weight.to_local().numel() == linear.weight.numel() for linear in spread)
dist.destroy_process_group()
"""


def test_each_process_holds_half(teacher_directory: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [str(script), str(teacher_directory)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
