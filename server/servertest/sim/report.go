package sim

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
)

// Report counts what was done.
type Report struct {
	Seeds      int
	Operations int // calls of clients
	Crashes    int // kills of the daemon
	Shutdowns  int // graceful ones
	Launches   int // containers started
	Exits      int // containers ended by themselves
	Jumps      int // of the clock
	Watches    int // streams opened
	Resumed    int // of them with a token
	Histories  int // checked for linearizability
	// Undecided are the seeds of those for which the search took too long.
	Undecided []uint64
	// Calls counts outcomes by method and code.
	Calls map[string]map[string]int
	// Passed counts how often each point was passed, Struck how often each fault
	// struck there: keys are `step:moment` and `step:moment:action`.
	Passed, Struck map[string]int
	Failures       []Failure
}

// Failure is a seed that found something.
type Failure struct {
	Seed uint64
	// Problem is what is wrong, Log the workload and what happened.
	Problem, Log string
}

// NewReport returns an empty report.
func NewReport() *Report {
	return &Report{Calls: make(map[string]map[string]int), Passed: make(map[string]int), Struck: make(map[string]int)}
}

func (r *Report) call(method, code string) {
	if r.Calls[method] == nil {
		r.Calls[method] = make(map[string]int)
	}
	r.Calls[method][code]++
}

// Add adds another report.
func (r *Report) Add(o *Report) {
	r.Seeds += o.Seeds
	r.Operations += o.Operations
	r.Crashes += o.Crashes
	r.Shutdowns += o.Shutdowns
	r.Launches += o.Launches
	r.Exits += o.Exits
	r.Jumps += o.Jumps
	r.Watches += o.Watches
	r.Resumed += o.Resumed
	r.Histories += o.Histories
	r.Undecided = append(r.Undecided, o.Undecided...)
	for method, byCode := range o.Calls {
		for code, n := range byCode {
			r.call(method, code)
			r.Calls[method][code] += n - 1
		}
	}
	for point, n := range o.Passed {
		r.Passed[point] += n
	}
	for strike, n := range o.Struck {
		r.Struck[strike] += n
	}
	r.Failures = append(r.Failures, o.Failures...)
}

// Missed returns the faults that never struck, of those that can.
func (r *Report) Missed() (missed []string) {
	for _, p := range points() {
		for _, a := range p.actions {
			if key := strikeKey(p.step, p.moment, a); r.Struck[key] == 0 {
				missed = append(missed, key)
			}
		}
	}
	return missed
}

func strikeKey(step string, m fault.Moment, a fault.Action) string {
	return fmt.Sprintf("%s:%s:%s", step, m, a)
}

// Write prints the report for a person.
func (r *Report) Write(w io.Writer) {
	fmt.Fprintf(w, "seeds %d, operations %d, crashes %d, shutdowns %d, containers started %d, ended by themselves %d, clock jumps %d, watches %d (resumed %d), violations %d\n",
		r.Seeds, r.Operations, r.Crashes, r.Shutdowns, r.Launches, r.Exits, r.Jumps, r.Watches, r.Resumed, len(r.Failures))
	if r.Histories > 0 {
		fmt.Fprintf(w, "histories checked for linearizability %d, undecided %v\n", r.Histories, r.Undecided)
	}
	fmt.Fprintf(w, "\n%-28s", "calls")
	var columns []string
	for _, byCode := range r.Calls {
		for code := range byCode {
			if !slices.Contains(columns, code) {
				columns = append(columns, code)
			}
		}
	}
	slices.SortFunc(columns, func(a, b string) int {
		return cmp.Or(-cmp.Compare(btoi(a == "OK"), btoi(b == "OK")), cmp.Compare(a, b))
	})
	for _, c := range columns {
		fmt.Fprintf(w, " %*s", max(len(c), 7), c)
	}
	fmt.Fprintln(w)
	for _, method := range slices.Sorted(maps.Keys(r.Calls)) {
		fmt.Fprintf(w, "%-28s", method)
		for _, c := range columns {
			fmt.Fprintf(w, " %*s", max(len(c), 7), count(r.Calls[method][c]))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "\n%-32s %9s", "faults struck", "passed")
	for _, a := range fault.Actions {
		fmt.Fprintf(w, " %8s", a)
	}
	fmt.Fprintln(w)
	for _, p := range points() {
		key := fmt.Sprintf("%s:%s", p.step, p.moment)
		fmt.Fprintf(w, "%-32s %9s", strings.ReplaceAll(key, ":", " "), count(r.Passed[key]))
		for _, a := range fault.Actions {
			cell := "-"
			if slices.Contains(p.actions, a) {
				cell = fmt.Sprint(r.Struck[strikeKey(p.step, p.moment, a)])
			}
			fmt.Fprintf(w, " %8s", cell)
		}
		fmt.Fprintln(w)
	}
}

func count(n int) string {
	if n == 0 {
		return "."
	}
	return fmt.Sprint(n)
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
