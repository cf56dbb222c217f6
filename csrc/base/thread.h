// How the core starts its threads: named, and without the application's signals.
//
// Threads: start_thread() may be called from any thread.
// Invariants: asynchronous signals stay the application's: Python wants them on its main thread, and a
//             program that blocks one to wait for it would lose it to a thread that does not. Faults stay
//             deliverable, so that crash reporters work. A refusal changes nothing: whoever hands work to a
//             thread starts the thread first.
#pragma once

#include <functional>
#include <stop_token>
#include <string>
#include <thread>

namespace offload {

// Throws kState when the system gives no more threads. The kernel keeps 15 characters of the name, which
// the thread has when this returns.
std::jthread start_thread(const std::string& name, std::function<void(std::stop_token)> body);

}  // namespace offload
