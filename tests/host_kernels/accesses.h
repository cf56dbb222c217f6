#pragma once

#include <string>

// `arguments` as cuLaunchKernel takes them; the launch is one of the compute stream.
void note_launch(const std::string& kernel, void** arguments);
