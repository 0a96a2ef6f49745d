"""TPP from an exported model with onnxruntime and NumPy alone, and how long a minute of PPG takes.

    python predict.py runs/M1.5.pth --export model.onnx
    python examples/onnx_predict.py model.onnx minute.csv --map 75 --dbp 55 --hr 80

minute.csv: a column of 3600 numbers, 60 s of PPG at 60 Hz in any unit (here without: a made-up
pulse). The vitals are those that the file asks for, in mmHg and beats/min.
"""
import argparse
import time

import numpy as np
import onnxruntime

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="what predict.py --export wrote")
parser.add_argument("ppg", nargs="?", help="a text file of 3600 numbers")
for name, usual in (("map", 75), ("sbp", 115), ("dbp", 55), ("pp", 60), ("hr", 80)):
    parser.add_argument(f"--{name}", type=float, default=usual, help=f"default: {usual}")
options = parser.parse_args()

settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = 1               # one core
settings.log_severity_level = 3                 # errors alone
session = onnxruntime.InferenceSession(options.model, settings, providers=["CPUExecutionProvider"])
print(session.get_modelmeta().custom_metadata_map)

t = np.arange(3600) / 60
ppg = np.loadtxt(options.ppg) if options.ppg else np.sin(2 * np.pi * options.hr / 60 * t)
inputs = {"ppg": ppg.reshape(1, 1, 3600).astype(np.float32)}
for vital in session.get_inputs()[1:]:
    inputs[vital.name] = np.array([getattr(options, vital.name)], np.float32)

milliseconds = []
for _ in range(21):
    start = time.perf_counter()
    outputs = session.run(None, inputs)
    milliseconds.append(1000 * (time.perf_counter() - start))
for output, value in zip(session.get_outputs(), outputs):
    print(f"{output.name}: {value[0]:.1f} mmHg")
print(f"latency of one segment on one core: {np.median(milliseconds):.1f} ms (median of 21)")
