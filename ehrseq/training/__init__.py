"""Training by the unmodified Trainer: recipes, stages, EhrMamba and HyMaTE. Attributes are loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "ClassifierOfPrompts": "trainer",
    "count_training_steps": "trainer",
    "last_checkpoint": "trainer",
    "leave_process_group": "trainer",
    "model_config": "trainer",
    "paper_schedule": "trainer",
    "prompted_dataset": "ehrseq.batches.prompts",
    "quiet_loading": "ehrseq.hub.checkpoints",
    "quiet_trainer": "trainer",
    "save_checkpoint": "ehrseq.hub.checkpoints",
    "score_rows": "ehrseq.batches.scoring",
    "training_arguments": "trainer",
    "use_paper_recipe": "trainer",
    "Recipe": "recipe",
    "Stage": "recipe",
    "list_recipes": "named_recipes",
    "read_recipe": "named_recipes",
    "PromptRecipe": "prompt_recipe",
    "TripletRecipe": "triplet_recipe",
    "run_stage": "stages",
    "calibrate_stay_forecasts": "forecast_calibration",
    "finetune": "triplets",
    "hold_out_stays": "ehrseq.encode.triplets",
    "pretrain": "triplets",
    "score_stays": "ehrseq.batches.scoring",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
