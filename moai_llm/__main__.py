"""python -m moai_llm"""

from moai_llm.cli import main

if __name__ == "__main__":
    main()
