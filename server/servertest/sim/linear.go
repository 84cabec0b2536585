package sim

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server/servertest/linear"
)

// RunLinear runs one seed of a workload of secrets, restarts, stops and starts, in
// the same world with the same faults and crashes as Run, and checks that one
// order explains all that clients were told and all that containers were started
// with.
func RunLinear(t *testing.T, seed uint64, dir string) *Report {
	t.Helper()
	p := drawLinear(seed)
	var h *linear.History
	r := inWorld(t, p, dir, func(here string) (*world, func() error, error) {
		w, err := newWorld(p, here, 2)
		if err != nil {
			return nil, nil, err
		}
		h = linear.NewHistory()
		s := &linearScene{world: w, history: h, cycles: newCycles(h.Now)}
		return w, s.play, nil
	})
	if h == nil || len(r.Failures) > 0 {
		return r
	}
	r.Histories++
	switch err := h.Check(linear.Options{Timeout: 20 * time.Second, AllLaunches: true}); {
	case errors.Is(err, linear.ErrUndecided):
		r.Undecided = append(r.Undecided, seed)
	case err != nil:
		r.Failures = append(r.Failures, Failure{Seed: seed, Problem: err.Error(), Log: p.String()})
	}
	return r
}

// linearScene records a history.
type linearScene struct {
	*world
	history *linear.History
	cycles  *cycles
}

func (s *linearScene) play() error {
	s.onDown = func() {
		synctest.Wait() // callers have noticed
		s.history.Barrier()
	}
	s.watchCalls(func(_ context.Context, c runtimetest.Call) error {
		s.cycles.before(c)
		return nil
	}, s.afterCall)
	if err := s.boot(); err != nil {
		return err
	}
	for i, id := range s.plan.stable {
		c := &linear.Client{API: s.api(0), History: s.history, ID: 100 + i}
		if _, err := c.Do(context.Background(), linear.Op{Kind: linear.Create, Workspace: id, Image: "a"}); err != nil {
			return fmt.Errorf("setup: %w", err)
		}
	}
	synctest.Wait()
	s.faults.enable()
	var clients sync.WaitGroup
	for i := range s.plan.linear {
		clients.Go(func() { s.client(i) })
	}
	done := make(chan struct{})
	go func() {
		clients.Wait()
		close(done)
	}()
	if err := s.conduct(s.plan.events, done); err != nil {
		return err
	}
	if err := s.calm(); err != nil {
		return err
	}
	// At the end everybody looks once more, and what runs has the newest values.
	c := &linear.Client{API: s.api(0), History: s.history, ID: 200}
	for _, id := range append(s.plan.stable, "") {
		ops := []linear.Op{{Kind: linear.List, Workspace: id}}
		if id != "" {
			ops = append(ops, linear.Op{Kind: linear.Get, Workspace: id})
		}
		for _, op := range ops {
			if err := s.do(c, op, time.Minute); err != nil {
				return fmt.Errorf("at the end: %s: %w", op, err)
			}
		}
	}
	return s.settled()
}

// client does what is planned for one of the clients.
func (s *linearScene) client(i int) {
	c := &linear.Client{API: s.api(i), History: s.history, ID: i}
	if i%2 == 0 {
		c.Retry = 200 * time.Millisecond
	}
	for _, o := range s.plan.linear[i] {
		<-time.After(o.gap)
		_ = s.do(c, o.Op, o.timeout) // the history has it
	}
}

func (s *linearScene) do(c *linear.Client, op linear.Op, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	_, err := c.Do(ctx, op)
	s.count("linear "+string(op.Kind), err)
	s.journal.add("%d: %s -> %v", c.ID, strings.ReplaceAll(op.String(), marker, ""), err)
	return err
}

// afterCall records what containers are started with.
func (s *linearScene) afterCall(_ context.Context, c runtimetest.Call) error {
	s.cycles.after(c, 0)
	if c.Method != runtimetest.Start {
		return nil
	}
	launches := s.fake.Launches(c.WorkspaceUID)
	launch := launches[len(launches)-1]
	if launch.Instance.ID != c.InstanceID {
		return nil
	}
	read, _ := s.cycles.launched(launch.Instance, s.faults.lateReads())
	s.history.Record(linear.Entry{
		Client: 300,
		Op:     linear.Op{Kind: linear.Launch, Workspace: c.WorkspaceID},
		Result: linear.Result{Generation: launch.Instance.Generation, Env: envOf(launch.Env)},
		Call:   read.from.at, Return: read.to,
	})
	return nil
}

// settled: what is meant to run runs, at its generation.
func (s *linearScene) settled() error {
	d := s.current()
	if d == nil {
		return errors.New("the daemon is down, and nobody ended it")
	}
	ws, _, err := d.Store.ListWorkspaces("", 0, nil)
	if err != nil {
		return err
	}
	for i := range ws {
		in, ok := s.fake.Running(ws[i].UID)
		if ok == ws[i].Parked || ok && in.Generation != ws[i].Generation {
			return fmt.Errorf("%s, parked %t, is at generation %d; %s runs at %d", ws[i].ID, ws[i].Parked, ws[i].Generation, in.ID, in.Generation)
		}
	}
	for _, v := range s.fake.Violations() {
		s.problem("the runtime: %s", v)
	}
	return nil
}

// linearOp is an operation of the plan.
type linearOp struct {
	linear.Op
	gap, timeout time.Duration
}

func (o linearOp) String() string {
	return fmt.Sprintf("after %v, within %v: %s", o.gap, o.timeout, o.Op)
}

// drawLinear draws a workload that the model knows: no clock jumps, no deletions,
// no other specs.
func drawLinear(seed uint64) *plan {
	d := roll(seed, 0, "linear")
	p := &plan{seed: seed, cycles: 1 + d.IntN(3), sweeps: d.chance(2), length: pick(d, time.Second, 10*time.Second, time.Minute)}
	for i := range 1 + d.IntN(3) {
		p.stable = append(p.stable, fmt.Sprintf("w%d", i))
	}
	p.lag = lag{
		step:   pick(d, 0, 5*time.Millisecond, 200*time.Millisecond, 2*time.Second),
		commit: pick(d, 0, time.Millisecond, 20*time.Millisecond, 300*time.Millisecond),
	}
	n := 4 + d.IntN(8)
	for c := range 2 + d.IntN(3) {
		ops := make([]linearOp, n)
		for i := range ops {
			ops[i] = drawLinearOp(p, c, i)
			ops[i].gap = gapOf(p, c, i, n)
		}
		p.linear = append(p.linear, ops)
	}
	p.drawFaults(d)
	for i := range d.IntN(5) {
		d := roll(seed, i, "event")
		draw := kinds[0].value // crash
		if d.chance(3) {
			draw = kinds[1+d.IntN(2)].value // shutdown, or a container ends
		}
		e := draw(p, d)
		e.at = d.between(0, p.length)
		p.events = append(p.events, e)
	}
	sortEvents(p.events)
	return p
}

var linearKinds = []weighted[linear.Kind]{
	{30, linear.Set}, {7, linear.Delete}, {10, linear.Batch}, {6, linear.Restart}, {3, linear.Stop}, {5, linear.Start},
	{12, linear.List}, {5, linear.Secret}, {12, linear.Get}, {10, linear.Wait},
}

func drawLinearOp(p *plan, client, i int) linearOp {
	d := roll(p.seed, client<<16|i, "linear op")
	o := linearOp{Op: linear.Op{Kind: pickWeighted(d, linearKinds), Workspace: pick(d, p.stable...)}}
	o.timeout = pick(d, 30*time.Second, 30*time.Second, 30*time.Second, 2*time.Second, 10*time.Millisecond)
	value := fmt.Sprintf("%s%d.%d", marker, client, i)
	if d.chance(6) {
		value = marker // not the only one
	}
	key := pick(d, keys...)
	switch o.Kind {
	case linear.Set, linear.Delete, linear.Batch, linear.List, linear.Secret:
		if d.chance(5) {
			o.Workspace = ""
		}
		o.NextStart = d.chance(8)
	}
	switch o.Kind {
	case linear.Set:
		o.Set = map[string]string{key: value}
		if d.chance(5) {
			o.IfVersion = 1 + int64(d.IntN(3))
		}
	case linear.Delete:
		o.Delete, o.AllowMissing = []string{key}, d.chance(2)
	case linear.Batch:
		o.Set = map[string]string{key: value}
		if other := pick(d, keys...); other != key {
			o.Delete = []string{other}
		}
		if other := pick(d, keys...); other != key && len(o.Delete) == 0 {
			o.Set[other] = value
		}
	case linear.Secret:
		o.Key = key
	case linear.Wait:
		o.Generation = int64(d.IntN(6))
		o.timeout = pick(d, time.Second, 20*time.Second)
	}
	return o
}
