"""Discernment via contrastive refinement: train, measure and explain less over-refusing models."""

__version__ = "0.1.0"
# What extensions do for the core, by the names under which `dcr.core.extending.part` asks for it.
# What settings choose between stands in the table of `dcr.extensions`.
PARTS: dict[str, str] = {
    "batch_size": "dcr.headroom:batch_size",
    "builtin_model": "dcr.builtin:folder_of",
    "chat_template": "dcr.chat_templates:chosen_template",
    "check_answered": "dcr.endpoints.subject:check_answered",
    "check_devices": "dcr.checking:check_devices",
    "check_extras": "dcr.resolving:check_extras",
    "check_settings": "dcr.checking:check_settings",
    "check_stages": "dcr.checking:check_stages",
    "claim": "dcr.continuing:claim",
    "claim_start": "dcr.continuing:claim_start",
    "closed_thoughts": "dcr.thinking.closing:ending_thoughts",
    "end_of_responses": "dcr.terminators:chosen_end",
    "examine": "dcr.balance:examined",
    "fault_of_run": "dcr.resolving:fault_of_run",
    "free_threads": "dcr.headroom:free_threads",
    "int8_adamw": "dcr.quantising:int8_adamw",
    "keep_template": "dcr.chat_templates:keep_template",
    "made_with": "dcr.headroom:made_with",
    "overlaps": "dcr.overlaps:overlaps",
    "own_rows": "dcr.own:own_rows",
    "pairs": "dcr.public:PAIRS",
    "quantised_model": "dcr.quantising:open_quantised",
    "readout_pairs": "dcr.readout.rows:with_pairs",
    "recorded": "dcr.headroom:recorded",
    "sharded_checkpoint": "dcr.sharding:read",
    "sharding": "dcr.sharding:Sharded",
    "sources": "dcr.public:SOURCES",
    "with_precisions": "dcr.continuing:with_precisions",
    "within_step": "dcr.stopping:WithinStep",
    "written_template": "dcr.chat_templates:written_template",
}
