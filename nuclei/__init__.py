"""Parts of the work on individual nuclei: crops and scale, blocks, measures and files of each nucleus, evaluation."""
