from deepstack_jax.cli import main

main()
