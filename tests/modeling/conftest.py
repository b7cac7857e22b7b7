UPSTREAM_MARKS = (
    *("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test", "order"),
    *("is_agent_test", "is_expert_parallel_test", "is_fsdp_test", "is_pipeline_test", "is_staging_test"),
    *("is_tensor_parallel_test", "is_training_test"),
)


def pytest_configure(config):
    """Marks of transformers' own tests (see upstream.py), which this project does not select by."""
    for mark in UPSTREAM_MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers' own tests")
