package sim

import (
	"strings"
	"testing"
	"time"

	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
)

// A seed is the same plan each time, and another one than the next.
func TestDraw(t *testing.T) {
	for seed := range uint64(50) {
		for _, d := range []func(uint64) *plan{draw, drawLinear} {
			if a, b := d(seed).String(), d(seed).String(); a != b {
				t.Fatalf("seed %d is\n%s\nand\n%s", seed, a, b)
			}
			if a, b := d(seed).String(), d(seed+1).String(); strings.ReplaceAll(a, "seed", "") == strings.ReplaceAll(b, "seed", "") {
				t.Fatalf("seeds %d and %d are the same", seed, seed+1)
			}
		}
	}
}

// Everything that can happen is drawn by some seed.
func TestDrawCoversAll(t *testing.T) {
	faults, ops, events := make(map[string]bool), make(map[string]bool), make(map[string]bool)
	for seed := range uint64(5000) {
		p := draw(seed)
		for _, f := range p.faults {
			faults[strikeKey(f.Step, f.Moment, f.Action)] = true
		}
		for _, client := range p.clients {
			for _, o := range client {
				ops[o.kind] = true
			}
		}
		for _, e := range p.events {
			events[strings.Fields(e.name)[0]] = true
		}
	}
	for _, p := range points() {
		for _, a := range p.actions {
			if key := strikeKey(p.step, p.moment, a); !faults[key] {
				t.Errorf("%s is never drawn", key)
			}
		}
	}
	for _, o := range opKinds {
		if !ops[o.value] {
			t.Errorf("%s is never drawn", o.value)
		}
	}
	if len(points()) < 40 || len(events) < 6 {
		t.Errorf("%d points, events %v", len(points()), events)
	}
}

func TestReport(t *testing.T) {
	a, b := NewReport(), NewReport()
	a.Seeds, b.Seeds = 1, 2
	a.call("Get", "OK")
	b.call("Get", "OK")
	b.call("Get", "NotFound")
	first := points()[0]
	key := strikeKey(first.step, first.moment, fault.Error)
	b.Struck[key]++
	missed := len(a.Missed())
	a.Add(b)
	a.Add(b)
	if a.Seeds != 5 || a.Calls["Get"]["OK"] != 3 || a.Calls["Get"]["NotFound"] != 2 || a.Struck[key] != 2 || len(a.Missed()) != missed-1 {
		t.Errorf("got %+v", a)
	}
	var text strings.Builder
	a.Write(&text)
	for _, want := range []string{"seeds 5", "Get", first.step} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("%q is missing in\n%s", want, text.String())
		}
	}
}

// A secret's value in the daemon's log is found, whatever attribute has it.
func TestJournalLeaks(t *testing.T) {
	j := newJournal()
	j.logger().With("workspace", "w").Info("all is well", "generation", 1)
	j.add("client 0: SetSecret K=v1")
	if lines := j.leaks(); len(lines) > 0 {
		t.Errorf("found %q", lines)
	}
	j.logger().WithGroup("g").Debug("oh", "env", []string{"K=" + secretValue("v1")})
	if lines := j.leaks(); len(lines) != 1 {
		t.Errorf("found %q", lines)
	}
}

// What is wrong in a bubble is reported, with what happened: a deadlock, a
// goroutine that is left, a panic.
func TestBubble(t *testing.T) {
	for name, f := range map[string]func() error{
		"goroutines remain": func() error {
			go func() { select {} }()
			return nil
		},
		"panic: oh": func() error { return guard(func() error { panic("oh") }) },
	} {
		if err := bubble(t, f); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("want %q, got %v", name, err)
		}
	}
	if err := bubble(t, func() error { <-time.After(time.Hour); return nil }); err != nil {
		t.Error(err)
	}
}
