from bench.gpu.cli import app

if __name__ == "__main__":
    app()
