// What a node computes: its attributes, read once, and the launch for each run.
#pragma once

#include <memory>

#include "ort.h"
#include "schema.h"

namespace qcompile {

class Node {
 public:
  virtual ~Node() = default;
  virtual void compute(OrtKernelContext* context, void* stream) const = 0;
};

// `type` is ONNX's of T. Throws where an attribute is missing or out of range.
std::unique_ptr<Node> make_node(const Definition& definition, int type, const OrtKernelInfo* info);

}  // namespace qcompile
