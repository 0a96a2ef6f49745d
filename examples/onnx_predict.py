"""Predict TPP with an exported model, onnxruntime and NumPy only; measure the time per segment.

    python predict.py runs/M1.5.pth --export model.onnx
    python examples/onnx_predict.py model.onnx minute.csv --map 75 --dbp 55 --hr 80

minute.csv: a column of 3600 numbers, 60 s of PPG at 60 Hz in any unit; default: a made-up pulse.
Vitals that the network does not use are ignored.
"""
import argparse
import time

import numpy as np
import onnxruntime

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="a file written by predict.py --export")
parser.add_argument("ppg", nargs="?", help="a text file of 3600 numbers")
for name, usual, unit in (("map", 75, "mmHg"), ("dbp", 55, "mmHg"), ("hr", 80, "beats/min")):
    parser.add_argument(f"--{name}", type=float, default=usual, help=f"{unit}; default {usual}")
options = parser.parse_args()

settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = 1               # one core
settings.log_severity_level = 3                 # errors only
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
