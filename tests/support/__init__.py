"""What tests share: reference models, fake servers, swarms in one process, faults."""
