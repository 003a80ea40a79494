"""The model for transformers. An exported folder has these classes in a file of its own, and needs no mmrec.

Whoever imports this package needs no ``trust_remote_code``.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from mmrec.export.hf.cache import StateCache
from mmrec.export.hf.configuration import MmrecConfig
from mmrec.export.hf.modeling import MmrecForCausalLM
from mmrec.export.hf.saving import PAD, save
from mmrec.export.hf.tokenization import MmrecTokenizer

AutoConfig.register(MmrecConfig.model_type, MmrecConfig)
AutoModelForCausalLM.register(MmrecConfig, MmrecForCausalLM)

__all__ = ["PAD", "MmrecConfig", "MmrecForCausalLM", "MmrecTokenizer", "StateCache", "save"]
