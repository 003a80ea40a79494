"""The model for transformers: what is exported imports these classes, so mmrec has to be installed there.

Whoever imports this package needs no ``trust_remote_code``.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from mmrec.export.hf.cache import StateCache
from mmrec.export.hf.configuration import MmrecConfig
from mmrec.export.hf.modeling import MmrecForCausalLM
from mmrec.export.hf.saving import save
from mmrec.export.hf.tokenization import PAD, MmrecTokenizer

AutoConfig.register(MmrecConfig.model_type, MmrecConfig)
AutoModelForCausalLM.register(MmrecConfig, MmrecForCausalLM)

__all__ = ["PAD", "MmrecConfig", "MmrecForCausalLM", "MmrecTokenizer", "StateCache", "save"]
