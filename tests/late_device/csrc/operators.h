#pragma once

namespace late {

// A fault on purpose: uploads from pinned memory are held back until they are released, after the kernel that reads them.
void set_holds_uploads(bool holds);
void release_uploads();

}  // namespace late
