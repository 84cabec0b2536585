package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

// line is a result for people.
func line(r measure.Result) string {
	verdict := "holds"
	switch {
	case r.Goal == "reported":
		verdict = ""
	case !r.Holds:
		verdict = "MISSED"
	}
	return strings.TrimRight(fmt.Sprintf("%-34s %10s %-4s (p95 %s) beside %s %s: %s times; %s %s",
		r.Name, number(r.OursMedian), r.Unit, number(r.OursP95), number(r.BesideMedian), r.Beside, number(r.Ratio), r.Goal, verdict), " ")
}

// number has three digits that count, as many as a benchmark is good for.
func number(v float64) string {
	switch a := max(v, -v); {
	case a >= 100:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 1:
		return fmt.Sprintf("%.2f", v)
	default:
		return fmt.Sprintf("%.3g", v)
	}
}

func writeJSON(path string, results []measure.Result) error {
	b, err := json.MarshalIndent(results, "", "  ")
	if err != nil {
		return err
	}
	return replaceFile(path, append(b, '\n'))
}

// replaceFile replaces a file at once: one that is there is never half written.
// It belongs to who owns its directory: only the measurement has to be root.
func replaceFile(path string, content []byte) error {
	if err := os.WriteFile(path+".new", content, 0o644); err != nil {
		return err
	}
	var dir unix.Stat_t
	if err := unix.Stat(filepath.Dir(path), &dir); err != nil {
		return err
	}
	if err := os.Chown(path+".new", int(dir.Uid), int(dir.Gid)); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func writeReport(path, command string, results []measure.Result) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Benchmarks\n\nMade by `%s` on %s; do not edit.\n\n", command, time.Now().UTC().Format(time.DateOnly))
	for _, f := range machine() {
		fmt.Fprintf(&b, "- %s: %s\n", f[0], f[1])
	}
	fmt.Fprint(&b, "\nEach figure and what stands beside it were measured in turn in one run.\nThe ratio is ours / beside; of rates (1/s) more is better, of all else less.\n\n")
	fmt.Fprintln(&b, "| figure | median | p95 | unit | beside | its median | ratio | goal | |")
	fmt.Fprintln(&b, "| --- | --: | --: | --- | --- | --: | --: | --- | --- |")
	for _, r := range results {
		verdict := map[bool]string{true: "holds", false: "**missed**"}[r.Holds]
		if r.Goal == "reported" {
			verdict = ""
		}
		ratio := "–" // to nothing there is none
		if r.BesideMedian > 0 {
			ratio = number(r.Ratio)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s | %s | %s |\n",
			r.Name, number(r.OursMedian), number(r.OursP95), r.Unit, r.Beside, number(r.BesideMedian), ratio, r.Goal, verdict)
	}
	return replaceFile(path, b.Bytes())
}

// machine says on what the figures were measured.
func machine() [][2]string {
	facts := [][2]string{
		{"processors", fmt.Sprintf("%d × %s", goruntime.NumCPU(), field("/proc/cpuinfo", "model name"))},
		{"memory", field("/proc/meminfo", "MemTotal")},
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		facts = append(facts, [2]string{"kernel", unix.ByteSliceToString(u.Release[:])})
	}
	facts = append(facts,
		[2]string{"Go", goruntime.Version()},
		[2]string{"containerd", firstLine("containerd", "--version")},
		[2]string{"runc", firstLine("runc", "--version")},
	)
	if exe, err := os.Executable(); err == nil {
		facts = append(facts, [2]string{"workspaced", firstLine(filepath.Join(filepath.Dir(exe), "workspaced"), "version")})
	}
	return facts
}

// field is the value behind the first key in a file of lines "key : value".
func field(path, key string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

// firstLine is the first line that a program prints.
func firstLine(program string, args ...string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, args...).Output()
	if err != nil {
		return "unknown"
	}
	first, _, _ := strings.Cut(string(out), "\n")
	return first
}
