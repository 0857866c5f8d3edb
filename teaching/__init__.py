"""What a teacher needs: the handout, its autograder and its report, made from the solution."""
