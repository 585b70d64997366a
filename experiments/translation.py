"""L2T-DLN and cross entropy on translation: the next subword, scored by BLEU of a beam search.

With no flags: transformer_small, narrow, on a language that the package makes up, L2T-DLN and cross entropy, 3 seeds.

  python -m experiments.translation
  python -m experiments.translation --dataset=multi30k_de_en --data_dir=DIR --student=transformer_small
  python -m experiments.translation --dataset=iwslt14.tokenized.de-en --student=transformer --max_length=60
  python -m experiments.translation --method=l2t_dlf,label_smoothing --beam=1

A data set is one of those by name, or the path of a folder with two aligned text files a split: train.de, train.en,
test.de, test.en. Subwords are learned from the training text and kept as subwords.model; seen.txt has translations of
some test sentences before and after.
"""

from absl import flags

from experiments import _flags
from experiments._command import command, run_one, start

flags.adopt_module_key_flags(_flags)

main = command("translation", run_one, task="translation")

if __name__ == "__main__":
    start(main)
