"""Checks that a checkpoint and a model fit: each HF tensor is used, each parameter is filled, and shapes agree.

Only names and shapes are needed, so this is done before any weight is read.
"""

from collections.abc import Collection, Iterator, Mapping

from mcore_swift.errors import UserError, raise_together
from mcore_swift.models.rules import Rule, RuleTable, Shape, Vocab

NOT_TOGETHER = "config.json and weights do not belong together: get both from one place"
OTHER_MODEL = "is it a checkpoint of the model in config.json?"
LISTED = 8
"""How many names a message lists before it only counts the rest."""


def check_hf(table: RuleTable, shapes: Mapping[str, Shape], source: str) -> dict[str, Shape]:
    """Shapes of the whole megatron-core tensors that an HF checkpoint is converted to, by key.

    shapes: of the HF tensors. source: name of the checkpoint for messages.
    Raises UserErrors with every tensor that is missing, not used, or has a wrong shape.
    """
    errors = []
    missing, unclaimed = table.missing_hf(shapes), table.unclaimed_hf(shapes)
    if missing:
        errors.append(
            UserError(
                f"{source} lacks {_listed(missing)}",
                remedy="its config.json asks for them: get the complete checkpoint, or mend config.json",
            )
        )
    if unclaimed:
        errors.append(
            UserError(
                f"{source} holds {_listed(unclaimed)}, which the model in its config.json has no use for",
                remedy="check architectures, num_hidden_layers and the bias options in config.json",
            )
        )
    mcore_shapes = {}
    for rule in table.rules:
        if all(name in shapes for name in rule.hf):
            try:
                mcore_shapes[rule.mcore] = _whole_shape(rule, shapes)
            except ValueError as error:
                errors.append(UserError(f"{source}: {error}", remedy=NOT_TOGETHER))
    raise_together(errors)
    return mcore_shapes


def check_model(
    table: RuleTable, expected: Mapping[str, Shape], model_shapes: Mapping[str, Shape], source: str
) -> None:
    """Raise UserErrors unless a model with tensors `model_shapes` is filled exactly by tensors `expected`.

    Both map megatron-core keys to shapes of whole tensors; the model's vocabulary may be padded.
    """
    no_rule = [key for key in model_shapes if key not in table.by_mcore]
    no_parameter = [key for key in expected if key not in model_shapes]
    errors = []
    if no_rule:
        errors.append(UserError(f"no tensor of {source} would fill the model's {_listed(no_rule)}"))
    if no_parameter:
        errors.append(
            UserError(f"the model has no parameter for {_listed(no_parameter)}, made from {source}")
        )
    for key, shape in model_shapes.items():
        if key in expected and not _fits(table.by_mcore[key], expected[key], shape):
            errors.append(
                UserError(
                    f"{source}: {', '.join(table.by_mcore[key].hf)} make {key} of shape"
                    f" {list(expected[key])}, the model has {list(shape)}",
                    remedy=NOT_TOGETHER,
                )
            )
    raise_together(errors)


def check_mcore(table: RuleTable, shapes: Mapping[str, Shape], source: str) -> None:
    """Raise UserErrors unless a megatron-core checkpoint holds exactly the tensors of the table.

    shapes: of its tensors by key, without optimizer state.
    """
    errors = []
    missing = [key for key in table.by_mcore if key not in shapes]
    if missing:
        errors.append(UserError(f"{source} lacks {_listed(missing)}", remedy=OTHER_MODEL))
    for line in _unused(table, shapes):
        errors.append(UserError(f"{source} holds {line}", remedy=OTHER_MODEL))
    for rule in table.rules:
        if rule.mcore in shapes:
            try:
                fits = _fits(rule, _whole_shape(rule, rule.hf_shapes(shapes[rule.mcore])), shapes[rule.mcore])
            except ValueError:
                fits = False
            if not fits:
                errors.append(
                    UserError(
                        f"{source}: {rule.mcore} of shape {list(shapes[rule.mcore])} does not divide into"
                        f" {', '.join(rule.hf)} as config.json means it",
                        remedy=NOT_TOGETHER,
                    )
                )
    raise_together(errors)


def _unused(table: RuleTable, keys: Collection[str]) -> Iterator[str]:
    unknown = [key for key in keys if key not in table.by_mcore]
    if unknown:
        yield f"{_listed(unknown)}, which no Hugging Face tensor is made of"


def _whole_shape(rule: Rule, shapes: Mapping[str, Shape]) -> Shape:
    shape = rule.shape(shapes)
    if isinstance(rule, Vocab) and shape[0] != rule.vocab_size:
        raise ValueError(
            f"{rule.hf[0]} has {shape[0]} rows, but vocab_size in config.json is {rule.vocab_size}"
        )
    return shape


def _fits(rule: Rule, expected: Shape, actual: Shape) -> bool:
    if isinstance(rule, Vocab):
        return actual[0] >= expected[0] and actual[1:] == expected[1:]
    return actual == expected


def _listed(names: Collection[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest
