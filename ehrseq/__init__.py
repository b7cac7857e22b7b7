"""ehrseq: risks from a patient's whole record."""
