"""The hyper-parameter sheet of L2T-DLN: a column per preset.

`paper` is Algorithm 1 to the letter. `released` is what the authors' code does; where the two differ the row says so.
`residual` is this project's default: it changes what makes the other two drift (see README) and nothing else.

| item                        | paper            | released         | residual                        | source         |
|-----------------------------|------------------|------------------|---------------------------------|----------------|
| student                     | SGD 0.1          | SGD 0.1          | SGD 0.1                         | 5.1            |
| its learning rate           | constant         | constant         | constant                        | 5.1; code      |
| clip of its gradient's norm | none             | none             | none                            | 5.1; code      |
| gamma, step size of the DLN | 1e-3, added      | 1e-3, subtracted | 1e-3, subtracted                | Eq. 3; code    |
| teacher                     | Adam 1e-3        | Adam 1e-3        | Adam 1e-2                       | 5.1            |
| unroll length N             | 25               | 15               | 25                              | 5.2; code      |
| batch, validation batch     | 25, 100          | 25, 100          | 25, 100                         | 5.2            |
| epochs                      | 10               | 10               | 20                              | 5.1            |
| validation ratio            | 0.5, every epoch | 0.5, every epoch | 0.5, every epoch                | Table 4; code  |
| second stage                | goes on          | starts again     | starts again                    | Alg. 1; code   |
| DLN inputs, biases          | 2, biases        | 4, none          | 4, none                         | Figure 3; code |
| DLN output                  | the loss         | the loss         | added to cross entropy, at zero | 5.2; code      |
| predictions                 | sigmoid          | sigmoid          | softmax                         | code           |
| LSTM preprocessing          | p = 10           | p = 10           | p = 10                          | code           |
| LSTM output                 | T(d)             | T(d)             | (T(d) - T(-d)) / 2              | Eq. 3; code    |
| LSTM at the start           | T(d)             | T(d)             | T(d)                            | code           |
| added to the LSTM's output  | -                | -                | -                               | Eq. 3; code    |
| updates of the DLN taken    | all              | all              | all                             | Eq. 3; code    |
| rounds of a student's life  | the run's        | the run's        | the run's                       | Alg. 1; code   |
| LSTM memory                 | never cleared    | never cleared    | never cleared                   | code           |
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Preset:
    """One column of the sheet.

    Sizes in examples, lengths in student steps, lives in rounds; an epoch is a pass over the validation data.
    """

    epochs: int = 10
    unroll_length: int = 25
    batch_size: int = 25
    validation_batch_size: int = 100
    validation_ratio: float = 0.5
    student_lr: float = 0.1
    student_schedule: str = "constant"
    student_clip: float = 0.0
    dln_lr: float = 1e-3
    teacher_lr: float = 1e-3
    second_stage: str = "continue"
    dln_form: str = "paper"
    squash: str = "sigmoid"
    reduction: str = "mean"
    residual: bool = False
    update_sign: int = 1
    preprocess: float | None = 10.0
    odd: bool = False
    silent: bool = False
    base: str = "none"
    accept: str = "always"
    life: int = 0
    reset_memory: str = "never"


PAPER = Preset()
RELEASED = Preset(unroll_length=15, second_stage="restart", dln_form="released", update_sign=-1)
RESIDUAL = dataclasses.replace(
    RELEASED, unroll_length=25, epochs=20, teacher_lr=1e-2, squash="softmax", residual=True, odd=True
)

PRESETS: dict[str, Preset] = {"residual": RESIDUAL, "paper": PAPER, "released": RELEASED}
