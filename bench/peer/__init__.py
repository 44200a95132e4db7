"""The whole model beside llama.cpp: same file, same machine, same minute."""
