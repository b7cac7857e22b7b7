"""Events in (FHIR, MEDS, simulation), datasets on disk, batches out. Attributes are loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "EventDataset": "dataset",
    "load_events": "dataset",
    "write_dataset": "dataset",
    "patient_from_bundle": "fhir",
    "read_fhir": "fhir",
    "read_meds": "meds",
    "load_physionet2012": "physionet2012",
    "DataCollatorForMaskedEvents": "masking",
    "ConversionReport": "report",
    "EVENT_COLUMNS": "schema",
    "EVENT_SCHEMA": "schema",
    "LABEL_SCHEMA": "schema",
    "validate_events": "schema",
    "validate_labels": "schema",
    "assign_splits": "splits",
    "PHYSIONET2012": "triplets",
    "StaticFeature": "triplets",
    "TripletSpec": "triplets",
    "TripletTable": "triplets",
    "build_triplets": "triplets",
    "select_variables": "triplets",
    "ForecastRows": "triplet_rows",
    "TripletRows": "triplet_rows",
    "forecast_baselines": "triplet_rows",
    "DataCollatorForPackedTriplets": "triplet_collation",
    "DataCollatorForTriplets": "triplet_collation",
    "PackableTriplets": "triplet_collation",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
