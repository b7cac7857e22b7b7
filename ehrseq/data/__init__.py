"""Events in (FHIR, MEDS, simulation), datasets on disk, batches out. Attributes are loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it; the whole name where it stands elsewhere today.
_EXPORTS = {
    "EventDataset": "dataset",
    "load_events": "sources",
    "write_dataset": "dataset",
    "patient_from_bundle": "fhir",
    "read_fhir": "fhir",
    "read_meds": "meds",
    "load_physionet2012": "physionet2012",
    "DataCollatorForMaskedEvents": "ehrseq.batches.masking",
    "ConversionReport": "report",
    "EVENT_COLUMNS": "schema",
    "EVENT_SCHEMA": "schema",
    "LABEL_SCHEMA": "schema",
    "validate_events": "schema",
    "validate_labels": "schema",
    "assign_splits": "splits",
    "PHYSIONET2012": "ehrseq.encode.triplets",
    "StaticFeature": "ehrseq.encode.triplets",
    "TripletSpec": "ehrseq.encode.triplets",
    "TripletTable": "ehrseq.encode.triplets",
    "build_triplets": "ehrseq.encode.triplets",
    "select_variables": "ehrseq.encode.triplets",
    "ForecastRows": "ehrseq.batches.triplet_rows",
    "TripletRows": "ehrseq.batches.triplet_rows",
    "forecast_baselines": "ehrseq.batches.triplet_rows",
    "DataCollatorForPackedTriplets": "ehrseq.batches.triplet_collation",
    "DataCollatorForTriplets": "ehrseq.batches.triplet_collation",
    "PackableTriplets": "ehrseq.batches.triplet_collation",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
