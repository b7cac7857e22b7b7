"""Checkpoints on the Hub: registration with transformers, cards, pushing. Attributes are loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "DataDescription": "cards",
    "EhrModelCard": "cards",
    "ModelFacts": "cards",
    "card_template": "cards",
    "ensure_card": "push",
    "push_to_hub": "push",
    "use_card": "push",
    "checkpoint_digest": "checkpoints",
    "load_checkpoint": "checkpoints",
    "quiet_loading": "checkpoints",
    "save_checkpoint": "checkpoints",
    "convert_odyssey_checkpoint": "convert_odyssey",
    "register_all": "registration",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
