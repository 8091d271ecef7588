// Reports: what happened, who did it, on which line of which kernel.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdlib>
#include <set>

#include "runtime.h"

namespace simt {

bool launch_failed = false;
std::string launch_error;

namespace {

std::vector<std::string> all;
// Said once per launch: the text's format and the place.
std::set<std::pair<const char*, std::string>> said;
int repeats;

// Of "void a::(anonymous namespace)::f<(Bug)3>(int)": a::f<(Bug)3>
std::string function_name(std::string s) {
  for (const char* noise : {"(anonymous namespace)::", "void "})
    for (size_t at; (at = s.find(noise)) != std::string::npos;) s.erase(at, strlen(noise));
  int depth = 0;
  for (size_t i = 0; i < s.size(); ++i) {
    depth += (s[i] == '<') - (s[i] == '>');
    if (s[i] == '(' && depth == 0) return s.substr(0, i);
  }
  return s;
}

// "file:line in function <- file:line in function", the inlined call first. Empty if there is no debug information.
std::string resolve(uintptr_t pc) {
  Dl_info module;
  if (!dladdr(reinterpret_cast<void*>(pc), &module) || !module.dli_fname) return "";
  const std::string command = format("addr2line -Cfise '%s' %#zx 2>/dev/null", module.dli_fname,
                                     pc - reinterpret_cast<uintptr_t>(module.dli_fbase));
  FILE* const out = popen(command.c_str(), "r");
  if (!out) return "";
  std::string result, function;
  char line[1024];
  for (int i = 0; fgets(line, sizeof line, out); ++i) {
    const std::string s(line, strcspn(line, "\n"));
    if (i % 2 == 0)
      function = function_name(s);
    else if (i < 8)
      result += (result.empty() ? "" : " <- ") + s.substr(0, s.find(" (discriminator")) + " in " + function;
  }
  pclose(out);
  return result;
}

std::string kernel_name() {
  const std::string s = resolve(reinterpret_cast<uintptr_t>(launched.function));
  const size_t at = s.rfind(" in ");
  return at == std::string::npos ? "?" : s.substr(at + 4);
}

std::string place(const Where& w) {
  if (w.site.file) {
    const char* slash = strrchr(w.site.file, '/');
    return format("%s:%d in %s", slash ? slash + 1 : w.site.file, w.site.line, w.site.function);
  }
  return w.pc ? resolve(w.pc - 1) : "";  // a return address: the call is just before
}

}  // namespace

std::string format(const char* f, ...) {
  char buffer[2048];
  va_list arguments;
  va_start(arguments, f);
  vsnprintf(buffer, sizeof buffer, f, arguments);
  va_end(arguments);
  return buffer;
}

std::string text(const Where& w) { return place(w); }

std::string text(const Thread& t) {
  const uint3& b = t.block->index;
  return format("block (%u,%u,%u) thread (%u,%u,%u) [warp %d lane %d]", b.x, b.y, b.z, t.index.x, t.index.y, t.index.z,
                t.warp, t.lane);
}

const char* text(Access a) { return a == Access::read ? "read" : a == Access::write ? "write" : "atomic"; }

void report(const Where& where, Then then, const char* f, ...) {
  char message[2048];
  va_list arguments;
  va_start(arguments, f);
  vsnprintf(message, sizeof message, f, arguments);
  va_end(arguments);
  const std::string key =
      where.site.file ? where.site.file + std::to_string(where.site.line) : std::to_string(where.pc);
  if (said.emplace(f, key).second) {
    const std::string at = place(where);
    all.push_back(message + (at.empty() ? "" : "\n    at " + at) + "\n    in kernel " + kernel_name());
    if (!launch_failed) launch_error = all.back();
    launch_failed = true;
  }
  const bool enough = said.size() >= static_cast<size_t>(launched.options.max_reports) || ++repeats > 1000;
  if (!current || (then == Then::go_on && !enough)) return;
  launched.abandoned = true;
  switch_to(nullptr);  // and never back
}

const std::vector<std::string>& reports() { return all; }
void clear_reports() { all.clear(); }
void forget_repeats() {
  said.clear();
  repeats = 0;
}

}  // namespace simt
