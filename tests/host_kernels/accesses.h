#pragma once

#include <string>

// `arguments` as cuLaunchKernel takes them.
void note_launch(void* stream, const std::string& kernel, void** arguments);
