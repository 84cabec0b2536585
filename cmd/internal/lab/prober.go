package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"
)

// Seen is what a workspace's program says of itself.
type Seen struct {
	// ID is another one after every start of the program.
	ID string `json:"id"`
	// Variables is how many the environment has; as many as Env unless one came
	// twice.
	Variables int               `json:"variables"`
	Env       map[string]string `json:"env"`
}

// Inside asks a workspace's envserver for its environment.
func Inside(ctx context.Context, socket string) (Seen, error) {
	client := unixClient(socket)
	defer client.CloseIdleConnections()
	data, err := get(ctx, client, "/env")
	if err != nil {
		return Seen{}, err
	}
	var seen Seen
	if err := json.Unmarshal(data, &seen); err != nil {
		return Seen{}, err
	}
	if seen.Variables != len(seen.Env) {
		return Seen{}, fmt.Errorf("environment has %d variables, but only %d names", seen.Variables, len(seen.Env))
	}
	return seen, nil
}

// Files asks a workspace's envserver for its secrets' files, by name.
func Files(ctx context.Context, socket string) (map[string]string, error) {
	client := unixClient(socket)
	defer client.CloseIdleConnections()
	data, err := get(ctx, client, "/files")
	if err != nil {
		return nil, err
	}
	var seen struct{ Files map[string]string }
	err = json.Unmarshal(data, &seen)
	return seen.Files, err
}

// WaitInside is Inside, tried again until the program, which may only just have
// been started, serves. A container is STARTED once its command was executed,
// so the program may need some more milliseconds to listen.
func WaitInside(ctx context.Context, socket string, ok func(Seen) bool) (Seen, error) {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		try, cancel := context.WithTimeout(ctx, time.Second)
		seen, err := Inside(try, socket)
		cancel()
		if err == nil && ok(seen) {
			return seen, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return seen, errors.Join(ctx.Err(), err)
		}
	}
}

func unixClient(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
}

func get(ctx context.Context, client *http.Client, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://workspace"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	return data, err
}

// Prober asks a workspace's envserver every millisecond who it is, and so
// measures from a client's point of view how long nobody answers.
type Prober struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu   sync.Mutex
	down Downtime
	// changed is closed, and replaced, with every new identity.
	changed chan struct{}
}

// Downtime is what a Prober saw.
type Downtime struct {
	// Answers counts the answered questions, Failures the others.
	Answers, Failures int
	// Starts are the identities of the program, in order.
	Starts []string
	// Gaps are the times from the last answer of one start to the first of the
	// next.
	Gaps []time.Duration
	// Overlaps counts answers of a start that another had replaced already.
	Overlaps int
}

// Median of the gaps; 0 if there were none.
func (d Downtime) Median() time.Duration {
	if len(d.Gaps) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(d.Gaps))
	return sorted[len(sorted)/2]
}

// Max of the gaps; 0 if there were none.
func (d Downtime) Max() time.Duration {
	if len(d.Gaps) == 0 {
		return 0
	}
	return slices.Max(d.Gaps)
}

// Probe starts a prober. End it with Stop. What happens before Await returned
// for the identity that answers now may be missed.
func Probe(socket string) *Prober {
	ctx, cancel := context.WithCancel(context.Background())
	p := &Prober{cancel: cancel, done: make(chan struct{}), changed: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.run(ctx, socket)
	}()
	return p
}

// Await waits until the prober itself had an answer of a start: another client
// may have had one before. Without it, a Stop right after a switch comes before
// the probe that would see it.
func (p *Prober) Await(ctx context.Context, id string) error {
	for {
		p.mu.Lock()
		saw, changed := slices.Contains(p.down.Starts, id), p.changed
		p.mu.Unlock()
		if saw {
			return nil
		}
		select {
		case <-changed:
		case <-p.done:
			return fmt.Errorf("the prober ended and had no answer of %s", id)
		case <-ctx.Done():
			return fmt.Errorf("the prober has no answer of %s: %w", id, ctx.Err())
		}
	}
}

// Stop ends the prober and returns what it saw. It can be called again.
func (p *Prober) Stop() Downtime {
	p.cancel()
	<-p.done
	return p.down
}

func (p *Prober) run(ctx context.Context, socket string) {
	client := unixClient(socket)
	defer client.CloseIdleConnections()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	var last time.Time
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		try, cancel := context.WithTimeout(ctx, time.Second)
		answer, err := get(try, client, "/id")
		cancel()
		now := time.Now()
		if ctx.Err() != nil {
			return
		}
		if p.record(string(answer), err, now.Sub(last)) {
			last = now
		}
	}
}

// record counts one answer, which came so long after the last one. It reports
// whether it is one of the newest start.
func (p *Prober) record(id string, err error, since time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := &p.down
	switch i := slices.Index(d.Starts, id); {
	case err != nil:
		d.Failures++
		return false
	case i < 0:
		if len(d.Starts) > 0 {
			d.Gaps = append(d.Gaps, since)
		}
		d.Starts = append(d.Starts, id)
		close(p.changed)
		p.changed = make(chan struct{})
	case i < len(d.Starts)-1:
		d.Overlaps++
		return false
	}
	d.Answers++
	return true
}

// PrintEnv prints what GET /env answers, as soon as it does, until ctx ends.
func PrintEnv(ctx context.Context, socket string, out io.Writer) error {
	client := unixClient(socket)
	defer client.CloseIdleConnections()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		data, err := get(ctx, client, "/env")
		if err == nil {
			_, err = out.Write(data)
			return err
		}
		select {
		case <-tick.C: // one that was just started does not listen yet
		case <-ctx.Done():
			return err
		}
	}
}
