"""``python -m tasks.navigation {fit,validate,test,predict,check} -c configs/<name>.yaml``; evaluate; benchmark."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["evaluate"]:
        from tasks.navigation.evaluate import main as evaluate

        evaluate(sys.argv[2:])
    elif sys.argv[1:2] == ["benchmark"]:
        from tasks.navigation.benchmark import main as benchmark

        benchmark(sys.argv[2:])
    else:
        from tasks.core.cli import main
        from tasks.navigation.data import NavigationDataModule
        from tasks.navigation.module import NavigationModule

        main(NavigationModule, NavigationDataModule)
