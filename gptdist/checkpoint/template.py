"""The template of conversations that a checkpoint's model was fine-tuned with: `template.json` beside the tensors."""

import json
from pathlib import Path

from gptdist.checkpoint import layout
from gptdist.data.templates import Template, template_from
from gptdist.errors import UserError

TEMPLATE_FILE = "template.json"


def stored_template(checkpoint: Path) -> Template | None:
    """The template that a checkpoint's model was fine-tuned with; None for a base model."""
    if TEMPLATE_FILE not in layout.complete(checkpoint).files:
        return None
    try:
        values = json.loads(layout.read_file(checkpoint, TEMPLATE_FILE))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{checkpoint}/{TEMPLATE_FILE} is not JSON ({error}); use another checkpoint") from error
    return template_from(values, f"{checkpoint}/{TEMPLATE_FILE}")
