"""Other libraries' calls, answered by this one. Opt-in: nothing is replaced by importing it.

kk.compat.fla            functions with the signatures of flash-linear-attention
kk.compat.transformers   patch() puts the delta rule into the models of Hugging Face transformers
"""

from kvkernels.compat import fla as fla
from kvkernels.compat import transformers as transformers
