// An op of the torch library by its name, as a typed call through the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace lora_ext::ops {

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace lora_ext::ops
