// Testreport reads `go test -json` and prints what a person needs: go test's
// own closing line of each package, everything about tests that failed, and, at
// the very end, how many tests ran and which were skipped.
//
// It exits with 1 when something failed, and, in CI (CI=true), when a test was
// skipped: there a green run has to mean that everything was tested.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
)

// event is one line of `go test -json`, see `go doc test2json`.
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
	Elapsed float64 // seconds
}

type testID struct{ pkg, test string }

type report struct {
	out     io.Writer
	running map[testID]*strings.Builder
	passed  int
	failed  []testID
	skipped []skip
	// broken packages did not build, or failed outside of a test.
	broken []string
	// slow are the tests and their first subtests, which may be parallel and are not in
	// the test's time then, that took a second or longer: CI's time has a limit, and
	// this says who takes it.
	slow []slow
}

type slow struct {
	testID
	seconds float64
}

// shown is how many of the slow tests are.
const shown = 30

type skip struct {
	testID
	reason string
}

func main() {
	r := &report{out: os.Stdout, running: make(map[testID]*strings.Builder)}
	if err := r.read(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
		os.Exit(1)
	}
	if !r.summarize(os.Getenv("CI") == "true") {
		os.Exit(1)
	}
}

// read follows the events to their end. Lines that are no events are printed.
func (r *report) read(in io.Reader) error {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if bytes.HasPrefix(line, []byte("{")) && json.Unmarshal(line, &e) == nil {
				r.event(e)
			} else if _, err := r.out.Write(line); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (r *report) event(e event) {
	id := testID{e.Package, e.Test}
	if e.Test != "" && strings.Count(e.Test, "/") < 2 && e.Elapsed >= 1 {
		r.slow = append(r.slow, slow{id, e.Elapsed})
	}
	switch e.Action {
	case "build-output":
		fmt.Fprint(r.out, e.Output)
	case "output":
		if e.Test == "" {
			// "PASS" says nothing that the closing line does not say.
			if e.Output != "PASS\n" {
				fmt.Fprint(r.out, e.Output)
			}
			return
		}
		if r.running[id] == nil {
			r.running[id] = new(strings.Builder)
		}
		r.running[id].WriteString(e.Output)
	case "pass":
		if e.Test != "" {
			r.passed++
			delete(r.running, id)
		}
	case "skip":
		if e.Test != "" {
			r.skipped = append(r.skipped, skip{id, reason(r.running[id])})
			delete(r.running, id)
		}
	case "fail":
		if e.Test != "" {
			r.failed = append(r.failed, id)
			r.print(id)
			return
		}
		// A test without an end was running when its package died.
		died := false
		for id := range r.running {
			if id.pkg == e.Package {
				r.failed = append(r.failed, id)
				r.print(id)
				died = true
			}
		}
		if !died && !slices.ContainsFunc(r.failed, func(f testID) bool { return f.pkg == e.Package }) {
			r.broken = append(r.broken, e.Package)
		}
	}
}

func (r *report) print(id testID) {
	if out := r.running[id]; out != nil {
		fmt.Fprint(r.out, out.String())
	}
	delete(r.running, id)
}

// summarize prints the end of the report and tells whether all is well.
func (r *report) summarize(ci bool) bool {
	slices.SortStableFunc(r.slow, func(a, b slow) int { return cmp.Compare(b.seconds, a.seconds) })
	for i, s := range r.slow[:min(shown, len(r.slow))] {
		if i == 0 {
			fmt.Fprintln(r.out, "\nthe slowest tests:")
		}
		fmt.Fprintf(r.out, "%8.1f s  %s %s\n", s.seconds, s.pkg, s.test)
	}
	fmt.Fprintf(r.out, "\n%d passed, %d failed, %d skipped (tests and subtests)\n",
		r.passed, len(r.failed), len(r.skipped))
	if len(r.skipped) > 0 {
		fmt.Fprintf(r.out, "\n!!! %d SKIPPED, so this run proves nothing about them:\n", len(r.skipped))
		for _, s := range r.skipped {
			fmt.Fprintf(r.out, "!!!   %s %s: %s\n", s.pkg, s.test, s.reason)
		}
	}
	ok := true
	for _, id := range r.failed {
		fmt.Fprintf(r.out, "FAIL %s %s\n", id.pkg, id.test)
		ok = false
	}
	for _, pkg := range r.broken {
		fmt.Fprintf(r.out, "FAIL %s: outside of its tests, see above\n", pkg)
		ok = false
	}
	if r.passed == 0 && ok {
		fmt.Fprintln(r.out, "FAIL no test ran")
		ok = false
	}
	if !ci {
		return ok
	}
	for _, s := range r.skipped {
		fmt.Fprintf(r.out, "FAIL %s %s: must not be skipped in CI\n", s.pkg, s.test)
		ok = false
	}
	return ok
}

var header = regexp.MustCompile(`^\s*(=== |--- SKIP)`)

// reason is what a skipped test said, on one line.
func reason(out *strings.Builder) string {
	if out == nil {
		return "no reason given"
	}
	var said []string
	for line := range strings.Lines(out.String()) {
		if !header.MatchString(line) {
			said = append(said, strings.TrimSpace(line))
		}
	}
	if len(said) == 0 {
		return "no reason given"
	}
	return strings.Join(said, " ")
}
