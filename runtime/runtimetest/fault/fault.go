// Package fault makes named steps fail on purpose. It is for tests: release code
// passes each of its steps through a function that it was configured with, which
// calls the step and does nothing else unless a test replaced it by
// Injector.Around.
package fault

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// Around is what release code passes its steps through: it calls do with ctx, or
// something like it, and returns its error.
type Around = func(ctx context.Context, step string, do func(context.Context) error) error

// Moment is when a rule strikes: before a step is done, or after it was done
// and before anybody learns of it.
type Moment string

// The moments.
const (
	Before Moment = "before"
	After  Moment = "after"
)

// Action is what a rule does.
type Action string

// The actions.
const (
	// Error makes the step fail with ErrInjected.
	Error Action = "error"
	// Hang holds the step until its context ends, and returns the context's error.
	Hang Action = "hang"
	// Panic panics.
	Panic Action = "panic"
	// Kill ends the process as kill -9 does; see Injector.Kill.
	Kill Action = "kill"
)

// Moments and Actions are all there are.
var (
	Moments = []Moment{Before, After}
	Actions = []Action{Error, Hang, Panic, Kill}
)

// ErrInjected is the error of Error, and what Panic panics with.
var ErrInjected = errors.New("injected fault")

// Rule is one fault.
type Rule struct {
	Step   string
	Moment Moment
	Action Action
	// Skip is how many times the step is let pass before the rule strikes.
	Skip int
	// Times is how many times it strikes then; 0: from then on.
	Times int
}

// String returns the rule as Parse reads it.
func (r Rule) String() string {
	return fmt.Sprintf("%s:%s:%s:%d:%d", r.Step, r.Moment, r.Action, r.Skip, r.Times)
}

// Parse reads rules, `step:moment:action[:skip[:times]]`, separated by commas.
// times is 1 when it is not given.
func Parse(text string) ([]Rule, error) {
	var rules []Rule
	for field := range strings.SplitSeq(text, ",") {
		if field = strings.TrimSpace(field); field == "" {
			continue
		}
		part := strings.Split(field, ":")
		if len(part) < 3 || len(part) > 5 {
			return nil, fmt.Errorf("fault %q: want step:moment:action[:skip[:times]]", field)
		}
		r := Rule{Step: part[0], Moment: Moment(part[1]), Action: Action(part[2]), Times: 1}
		if r.Moment != Before && r.Moment != After {
			return nil, fmt.Errorf("fault %q: %q is no moment", field, r.Moment)
		}
		switch r.Action {
		case Error, Hang, Panic, Kill:
		default:
			return nil, fmt.Errorf("fault %q: %q is no action", field, r.Action)
		}
		for i, number := range []*int{&r.Skip, &r.Times} {
			if len(part) <= 3+i {
				continue
			}
			n, err := strconv.Atoi(part[3+i])
			if err != nil || n < 0 {
				return nil, fmt.Errorf("fault %q: %q is no count", field, part[3+i])
			}
			*number = n
		}
		rules = append(rules, r)
	}
	return rules, nil
}

// Point is a step and a moment of it.
type Point struct {
	Step   string
	Moment Moment
}

// Strike is a fault that happened.
type Strike struct {
	Point
	Action Action
}

// Injector strikes by its rules. Its methods may be called from many goroutines.
type Injector struct {
	// Kill is called for the action Kill; nil: this process is killed. It is set
	// before Around is first called.
	Kill func()

	mu      sync.Mutex
	rules   []*rule
	passed  map[Point]int
	strikes map[Strike]int
}

type rule struct {
	Rule
	passed, struck int
}

// New returns an injector with these rules.
func New(rules ...Rule) *Injector {
	in := &Injector{passed: make(map[Point]int), strikes: make(map[Strike]int)}
	in.Set(rules...)
	return in
}

// Set replaces the rules. What hangs goes on hanging.
func (in *Injector) Set(rules ...Rule) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.rules = nil
	for _, r := range rules {
		in.rules = append(in.rules, &rule{Rule: r})
	}
}

// Around does a step, with the faults that its rules ask for.
func (in *Injector) Around(ctx context.Context, step string, do func(context.Context) error) error {
	if err := in.at(ctx, Point{step, Before}); err != nil {
		return err
	}
	if err := do(ctx); err != nil {
		return err
	}
	return in.at(ctx, Point{step, After})
}

func (in *Injector) at(ctx context.Context, p Point) error {
	switch action := in.next(p); action {
	case "":
		return nil
	case Hang:
		<-ctx.Done()
		return ctx.Err()
	case Panic:
		panic(fmt.Errorf("%w %s %s", ErrInjected, p.Moment, p.Step))
	case Kill:
		if in.Kill != nil {
			in.Kill()
			return fmt.Errorf("%w: killed %s %s", ErrInjected, p.Moment, p.Step)
		}
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // until it has come
	default:
		return fmt.Errorf("%w %s %s", ErrInjected, p.Moment, p.Step)
	}
}

// next returns what happens at the point, and counts it.
func (in *Injector) next(p Point) (action Action) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.passed[p]++
	for _, r := range in.rules {
		if r.Step != p.Step || r.Moment != p.Moment {
			continue
		}
		r.passed++
		if r.passed <= r.Skip || (r.Times > 0 && r.struck >= r.Times) || action != "" {
			continue
		}
		r.struck++
		action = r.Action
		in.strikes[Strike{p, action}]++
	}
	return action
}

// Passed returns how often each point was passed, with and without a fault.
func (in *Injector) Passed() map[Point]int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return maps.Clone(in.passed)
}

// Strikes returns how often each fault struck.
func (in *Injector) Strikes() map[Strike]int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return maps.Clone(in.strikes)
}
