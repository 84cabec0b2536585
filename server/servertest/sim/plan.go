package sim

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
)

// plan is a seed's workload, all of it drawn before anything happens.
type plan struct {
	seed uint64
	// stable workspaces are there from the start, and are never deleted. mayflies
	// come and go.
	stable, mayflies []string
	clients          [][]op       // what each does, one after another
	linear           [][]linearOp // the same, for RunLinear
	watchers         []watchPlan
	events           []event
	faults           []planned
	rate             int // besides, one of so many points fails; 0: none
	lag              lag
	cycles           int // how many at once
	length           time.Duration
	sweeps           bool // half of the worlds do without, and must come to rest all the same
}

// draw makes the plan of a seed. Most are small: a bug that shows shows in few
// steps, and many seeds see more than long ones.
func draw(seed uint64) *plan {
	d := roll(seed, 0, "plan")
	p := &plan{
		seed: seed, cycles: 1 + d.IntN(4), sweeps: d.chance(2),
		length: pick(d, time.Second, 10*time.Second, time.Minute, 10*time.Minute),
	}
	n := 3 + d.IntN(6)
	mayflies := 1 + d.IntN(n-1)/2
	for i := range n {
		if i < n-mayflies {
			p.stable = append(p.stable, fmt.Sprintf("s%d", i))
		} else {
			p.mayflies = append(p.mayflies, fmt.Sprintf("m%d", i))
		}
	}
	p.lag = lag{
		step:   pick(d, 0, 5*time.Millisecond, 200*time.Millisecond, 3*time.Second),
		commit: pick(d, 0, 0, time.Millisecond, 20*time.Millisecond, 2*time.Second),
	}
	total := pick(d, 6, 10, 16, 24, 40)
	for c := range 1 + d.IntN(4) {
		p.clients = append(p.clients, drawClient(p, c, total))
	}
	for i := range d.IntN(3) {
		p.watchers = append(p.watchers, drawWatcher(p, i))
	}
	p.drawFaults(d)
	p.drawEvents()
	return p
}

func drawClient(p *plan, client, total int) []op {
	n := total/4 + roll(p.seed, client, "client").IntN(total)/2 + 1
	ops := make([]op, n)
	for i := range ops {
		ops[i] = drawOp(p, client, i)
		ops[i].gap = gapOf(p, client, i, n)
	}
	return ops
}

// gapOf draws how long a client waits before a call. Often not at all: then it is
// concurrent with whatever else happens at that moment.
func gapOf(p *plan, client, i, n int) time.Duration {
	d := roll(p.seed, client<<16|i, "gap")
	if d.chance(2) {
		return 0
	}
	// Few different moments, so that clients meet.
	step := p.length / time.Duration(2*n)
	return step * time.Duration(d.IntN(5))
}

// drawFaults draws none, some in certain places, or some everywhere.
func (p *plan) drawFaults(d dice) {
	switch d.IntN(10) {
	case 0: // a fair day
		return
	case 1, 2:
		p.rate = pick(d, 10, 25, 60)
		return
	}
	all := points()
	for i := range 1 + d.IntN(5) {
		d := roll(p.seed, i, "fault")
		where := pick(d, all...)
		f := planned{
			Rule: fault.Rule{
				Step: where.step, Moment: where.moment, Action: pick(d, where.actions...),
				Skip: pick(d, 0, 0, 0, 1, 2, 5), Times: pick(d, 1, 1, 2, 3, 8),
			},
			from: d.between(0, p.length/2),
		}
		f.to = f.from + d.between(p.length/10, p.length)
		if d.chance(2) {
			f.workspace = pick(d, slices.Concat(p.stable, p.mayflies)...)
		}
		if slices.Contains(rare, where.step) { // the first time that it comes about
			f.workspace, f.Skip, f.from, f.to = "", 0, 0, 2*p.length
		}
		p.faults = append(p.faults, f)
	}
}

// rare are steps that few workspaces pass.
var rare = []string{
	"secrets.live", "status.rotated", "status.exit", "status.stopped", "status.settled", "status.deleted",
	methodStep(runtimetest.Rotate), methodStep(runtimetest.RemoveWorkspace), methodStep(runtimetest.Watch),
}

// drawEvents draws what the conductor does.
func (p *plan) drawEvents() {
	n := roll(p.seed, 0, "events").IntN(6)
	for i := range n {
		d := roll(p.seed, i, "event")
		e := pickWeighted(d, kinds)(p, d)
		e.at = d.between(0, p.length)
		for range max(1, e.times) {
			p.events = append(p.events, e)
			e.at += e.every
		}
	}
	sortEvents(p.events)
}

func sortEvents(events []event) {
	slices.SortStableFunc(events, func(a, b event) int { return cmp.Compare(a.at, b.at) })
}

// kinds draw an event of a kind.
var kinds = []weighted[func(p *plan, d dice) event]{
	{5, func(*plan, dice) event {
		return event{name: "crash", do: func(w *world) error { w.kill(); return nil }}
	}},
	{2, func(p *plan, d dice) event {
		patience := pick(d, 0, time.Second, time.Minute)
		return event{name: fmt.Sprintf("shutdown, patient for %v", patience), do: func(w *world) error {
			if err := w.shutdown(patience); err != nil {
				return err
			}
			<-time.After(p.downtime(w.report.Shutdowns))
			return w.boot()
		}}
	}},
	{4, func(p *plan, d dice) event {
		id, exit := pick(d, slices.Concat(p.stable, p.mayflies)...), exitOf(d)
		return event{name: fmt.Sprintf("the container of %s ends: %+v", id, exit), do: func(w *world) error {
			w.exit(id, exit)
			return nil
		}}
	}},
	{2, func(p *plan, d dice) event { // a container that ends again and again
		id, exit, n := pick(d, slices.Concat(p.stable, p.mayflies)...), exitOf(d), 2+d.IntN(6)
		every := d.between(500*time.Millisecond, 5*time.Second)
		return event{name: fmt.Sprintf("the container of %s ends, again and again: %+v", id, exit), times: n, every: every, do: func(w *world) error {
			w.exit(id, exit)
			return nil
		}}
	}},
	{2, func(_ *plan, d dice) event {
		by := pick(d, time.Second, time.Minute, 2*time.Hour, 50*time.Hour)
		if d.chance(2) {
			by = -by
		}
		return event{name: fmt.Sprintf("the clock jumps by %v", by), do: func(w *world) error {
			w.skew.Add(int64(by))
			w.jumped.Add(1)
			w.report.Jumps++
			return nil
		}}
	}},
	{1, func(_ *plan, d dice) event {
		running := d.chance(2)
		return event{name: fmt.Sprintf("an orphan appears, running %t", running), do: func(w *world) error {
			if w.plan.sweeps {
				w.addOrphan(running)
			}
			return nil
		}}
	}},
	{1, func(_ *plan, d dice) event {
		uid, n := pick(d, "", "another"), d.IntN(4)
		return event{name: fmt.Sprintf("%d containers of daemon %q", n, uid), do: func(w *world) error {
			w.fake.SetForeign(uid, n)
			return nil
		}}
	}},
}

// downtime draws how long the daemon is gone after its n-th end.
func (p *plan) downtime(n int) time.Duration {
	d := roll(p.seed, n, "downtime")
	return pick(d, 0, d.between(0, min(p.length/20, 10*time.Second)))
}

func (p *plan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: %v, %d cycles at once, sweeps %t, steps take up to %v, commits up to %v\n",
		p.seed, p.length, p.cycles, p.sweeps, p.lag.step, p.lag.commit)
	fmt.Fprintf(&b, "workspaces %v, and now and then %v\n", p.stable, p.mayflies)
	for i, ops := range p.clients {
		fmt.Fprintf(&b, "client %d\n", i)
		for _, o := range ops {
			fmt.Fprintf(&b, "  %s\n", o)
		}
	}
	for i, ops := range p.linear {
		fmt.Fprintf(&b, "client %d\n", i)
		for _, o := range ops {
			fmt.Fprintf(&b, "  %s\n", strings.ReplaceAll(o.String(), marker, ""))
		}
	}
	for i, wp := range p.watchers {
		fmt.Fprintf(&b, "watcher %d: %+v\n", i, wp)
	}
	for _, e := range p.events {
		fmt.Fprintf(&b, "at %v: %s\n", e.at, e.name)
	}
	for _, f := range p.faults {
		fmt.Fprintf(&b, "fault %s\n", f)
	}
	if p.rate > 0 {
		fmt.Fprintf(&b, "besides, one of %d points fails\n", p.rate)
	}
	return b.String()
}

// appliesLater reports whether anybody changes a secret of a workspace, or the
// global one, for the next start only.
func (p *plan) appliesLater(id, key string) bool {
	return p.anyLater(func(o *op) bool { return (o.ws == id || o.ws == "") && slices.Contains(o.keysOf(), key) })
}

// anyLater reports whether there is such a change for the next start only.
func (p *plan) anyLater(such func(o *op) bool) bool {
	for _, ops := range p.clients {
		for _, o := range ops {
			if o.nextStart && such(&o) {
				return true
			}
		}
	}
	return false
}

// exit ends the container that runs for a workspace.
func (w *world) exit(id string, exit runtime.Exit) bool {
	in, ok := w.fake.Running(id)
	if !ok {
		return false
	}
	if w.noteEnd != nil {
		w.noteEnd(in.ID, endExit)
	}
	if !w.fake.Exit(in.ID, exit) {
		return false
	}
	w.mu.Lock()
	w.report.Exits++
	w.mu.Unlock()
	return true
}

// orphanPrefix is of the names of workspaces that never were.
const orphanPrefix = "orphan"

func isOrphan(ws string) bool { return strings.HasPrefix(ws, orphanPrefix) }

// addOrphan puts a container there that belongs to no workspace.
func (w *world) addOrphan(running bool) {
	w.orphans.Lock() // a sweep that comes in between has to wait
	defer w.orphans.Unlock()
	ctx := ours(context.Background())
	n := w.tick()
	spec := runtime.Spec{
		WorkspaceID: fmt.Sprintf("%s%d", orphanPrefix, n), WorkspaceUID: fmt.Sprintf("uid-of-orphan-%d", n), Generation: 1, Image: "a",
	}
	fake := runtimetest.Runtime(w.fake)
	if _, err := fake.EnsureImage(ctx, spec.Image); err != nil {
		return // killed just now
	}
	in, err := fake.Prepare(ctx, spec)
	if err == nil && running {
		_, _ = fake.Start(ctx, in.ID, runtime.Launch{Generation: 1})
	}
}
