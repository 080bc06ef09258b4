#pragma once

namespace late {

// Once for each process.
void register_device();

}  // namespace late
