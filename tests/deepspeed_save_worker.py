"""One rank of a DeepSpeed engine: three steps, then a save. `torchrun -m tests.deepspeed_save_worker STAGE DIR`

Beside the checkpoint it writes expected.pt, the weights as DeepSpeed's own zero_to_fp32 reads them.
"""

import os
import sys

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from gptdist.model import LanguageModel
from gptdist.parallel.init import fill_initial_values
from tests.test_convert_foreign import CONFIG

SETTINGS = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False}


def run(stage: int, folder: str) -> None:
    deepspeed.init_distributed("gloo")
    model = LanguageModel(CONFIG)
    fill_initial_values(model, seed=1)
    groups = [dict(params=[p for p in model.parameters() if (p.dim() > 1) == matrices]) for matrices in (True, False)]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2),
                                      config=SETTINGS | {"zero_optimization": {"stage": stage}})
    generator = torch.Generator().manual_seed(engine.local_rank)
    for _ in range(3):
        tokens = torch.randint(0, CONFIG.vocab_size, (2, CONFIG.context + 1), generator=generator)
        engine.backward(engine(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).mean())
        engine.step()
    engine.save_checkpoint(folder)
    torch.distributed.barrier()
    if engine.local_rank == 0:
        state = get_fp32_state_dict_from_zero_checkpoint(folder) if stage else engine.module.state_dict()
        torch.save({name: value.clone() for name, value in state.items()}, f"{folder}/expected.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)
