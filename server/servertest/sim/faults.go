package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

// point is where faults strike.
type point struct {
	step    string
	moment  fault.Moment
	actions []fault.Action
}

// methods are those of the runtime, in the order of a cycle.
var methods = []runtimetest.Method{
	runtimetest.List, runtimetest.EnsureImage, runtimetest.Prepare, runtimetest.Arm, runtimetest.Stop, runtimetest.Start, runtimetest.Rotate,
	runtimetest.Watch, runtimetest.Remove, runtimetest.RemoveWorkspace, runtimetest.Foreign,
}

// Steps that are something special.
const (
	listAll  = "runtime.ListAll" // a List of everything
	stepLate = "secrets.late"
)

func methodStep(m runtimetest.Method) string { return "runtime." + string(m) }

// points are all points of all steps: the store's, the actors' and the runtime's.
var points = sync.OnceValue(func() []point {
	steps := slices.Concat(store.Steps, workspace.Steps)
	for _, m := range methods {
		steps = append(steps, methodStep(m))
	}
	var list []point
	for _, step := range append(steps, listAll) {
		for _, moment := range fault.Moments {
			actions := fault.Actions
			if step == listAll {
				// The one at boot is in no loop that would recover: it ends the process,
				// which is what a kill does.
				actions = []fault.Action{fault.Error, fault.Hang, fault.Kill}
			}
			list = append(list, point{step, moment, actions})
		}
	}
	return list
})

// lag is how long steps take.
type lag struct {
	step   time.Duration // of runtime and actors, at most
	commit time.Duration
}

// planned is a fault of the plan.
type planned struct {
	fault.Rule
	workspace string        // "": of any
	from, to  time.Duration // when it can strike, from the start
}

func (p planned) String() string {
	who := p.workspace
	if who == "" {
		who = "any"
	}
	return fmt.Sprintf("%s of %s, from %v to %v", p.Rule, who, p.from, p.to)
}

// injector makes steps take their time, and fail as planned.
type injector struct {
	world *world

	mu      sync.Mutex
	rules   []*activeRule
	rate    int // one of so many points strikes; 0: none
	enabled bool
	same    map[string]passage // by point and workspace
	healed  chan struct{}      // closed by heal
	panics  int                // of actors, since the last boot
	late    int                // failed late reads
}

// passage is when a point was last passed, and how often at that time. The dice
// of a passage are named by both: who came first at another time is no matter.
type passage struct {
	at time.Duration
	n  int
}

type activeRule struct {
	planned
	passed, struck int
}

func newInjector(w *world) *injector {
	in := &injector{world: w, same: make(map[string]passage), healed: make(chan struct{}), rate: w.plan.rate}
	for _, p := range w.plan.faults {
		in.rules = append(in.rules, &activeRule{planned: p})
	}
	return in
}

// enable begins to make trouble.
func (in *injector) enable() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.enabled = true
}

// heal ends all faults: what hangs goes on, and no step takes time any more.
func (in *injector) heal() {
	in.mu.Lock()
	defer in.mu.Unlock()
	select {
	case <-in.healed:
	default:
		close(in.healed)
	}
	in.rules, in.rate = nil, 0
}

func (in *injector) isHealed() bool {
	select {
	case <-in.healed:
		return true
	default:
		return false
	}
}

// lateReads reports whether all late reads so far have succeeded.
func (in *injector) lateReads() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.late == 0
}

// around is for the steps of store and actors of one daemon.
func (in *injector) around(ctx context.Context, step string, do func(context.Context) error) error {
	if err := in.at(ctx, step, fault.Before, ""); err != nil {
		return err
	}
	if err := do(ctx); err != nil {
		return err
	}
	return in.at(ctx, step, fault.After, "")
}

// hook is for the calls of the runtime.
func (in *injector) hook(moment fault.Moment) runtimetest.Hook {
	return func(ctx context.Context, c runtimetest.Call) error {
		if isOurs(ctx) {
			return nil
		}
		if isOrphan(c.WorkspaceID) && c.Method == runtimetest.Remove {
			in.world.orphans.Lock() // one that is half made is not there yet
			in.world.orphans.Unlock()
		}
		step := methodStep(c.Method)
		if c.Method == runtimetest.List && c.WorkspaceUID == "" {
			step = listAll
		}
		return in.at(ctx, step, moment, c.WorkspaceID)
	}
}

// at is a point that is passed: it takes its time, and then a fault strikes or
// does not.
func (in *injector) at(ctx context.Context, step string, moment fault.Moment, ws string) error {
	pause, dice := in.pass(step, moment, ws)
	if pause > 0 && !in.wait(ctx, time.After(pause)) {
		return ctx.Err()
	}
	action := in.strike(step, moment, ws, dice)
	if action == "" {
		return nil
	}
	in.world.journal.add("fault %s %s %s %s", action, moment, step, ws)
	switch action {
	case fault.Hang:
		if !in.wait(ctx, nil) {
			return ctx.Err()
		}
		return nil
	case fault.Panic:
		panic(fmt.Errorf("%w %s %s", fault.ErrInjected, moment, step))
	case fault.Kill:
		in.world.kill()
		return fmt.Errorf("%w: killed %s %s", fault.ErrInjected, moment, step)
	default:
		return in.world.injected(step, moment, dice)
	}
}

// injected is the error of a fault.
func (w *world) injected(step string, moment fault.Moment, d dice) error {
	err := fmt.Errorf("%w %s %s", fault.ErrInjected, moment, step)
	switch {
	case slices.Contains(store.Steps, step) && d.chance(2):
		return errors.Join(err, syscall.ENOSPC)
	case slices.Contains(store.Steps, step), slices.Contains(workspace.Steps, step), d.chance(2):
		return err
	}
	return &runtime.Error{Reason: runtime.ReasonRuntimeUnavailable, Message: "containerd does not answer", Err: err}
}

// wait waits for a channel (nil: none), or until all is healed. It returns false
// when ctx ends first.
func (in *injector) wait(ctx context.Context, c <-chan time.Time) bool {
	select {
	case <-c:
		return true
	case <-in.healed:
		return true
	case <-ctx.Done():
		return false
	}
}

// pass counts a point that is passed, and says how long it takes.
func (in *injector) pass(step string, moment fault.Moment, ws string) (pause time.Duration, d dice) {
	in.mu.Lock()
	defer in.mu.Unlock()
	key := string(moment) + " " + step + " " + ws
	now := in.world.elapsed()
	n := 0
	if last := in.same[key]; last.at == now {
		n = last.n + 1
	}
	in.same[key] = passage{now, n}
	in.world.report.Passed[step+":"+string(moment)]++
	d = roll(in.world.plan.seed, n, "step", key, now.String())
	most := in.world.plan.lag.step
	if slices.Contains(store.Steps, step) {
		most = in.world.plan.lag.commit
	}
	if in.enabled && !in.isHealed() && most > 0 && d.chance(2) {
		pause = d.between(0, most)
	}
	return pause, d
}

// strike says which fault strikes at a point, if any does, and counts it.
func (in *injector) strike(step string, moment fault.Moment, ws string, d dice) fault.Action {
	alive := in.world.alive() // what goes on in a dead one is no matter
	in.mu.Lock()
	defer in.mu.Unlock()
	if !alive || !in.enabled || in.isHealed() {
		return ""
	}
	action := in.choose(step, moment, ws, d)
	if action == "" {
		return ""
	}
	in.world.report.Struck[strikeKey(step, moment, action)]++
	if step == stepLate && action != fault.Kill {
		in.late++
	}
	if action == fault.Panic && !slices.Contains(store.Steps, step) && step != methodStep(runtimetest.Foreign) && !isOrphan(ws) {
		in.panics++
	}
	return action
}

func (in *injector) choose(step string, moment fault.Moment, ws string, d dice) fault.Action {
	now := in.world.elapsed()
	for _, r := range in.rules {
		if r.Step != step || r.Moment != moment || r.workspace != "" && ws != "" && r.workspace != ws {
			continue
		}
		if now < r.from || now >= r.to {
			continue
		}
		r.passed++
		if r.passed > r.Skip && r.struck < r.Times {
			r.struck++
			return r.Action
		}
	}
	if in.rate == 0 || !d.chance(in.rate) {
		return ""
	}
	i := slices.IndexFunc(points(), func(p point) bool { return p.step == step && p.moment == moment })
	action := pick(d, points()[i].actions...)
	if action == fault.Kill && !d.chance(4) {
		return fault.Error // a daemon that dies all the time does nothing else
	}
	return action
}

// oursKey marks calls of the Fake that the simulation makes itself.
type oursKey struct{}

func ours(ctx context.Context) context.Context { return context.WithValue(ctx, oursKey{}, true) }

func isOurs(ctx context.Context) bool { return ctx.Value(oursKey{}) != nil }
