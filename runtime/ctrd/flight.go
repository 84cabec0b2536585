package ctrd

import (
	"context"
	"sync"
)

// flights lets concurrent calls for one key share one execution. A caller whose
// context ends leaves; when none is left, the execution is cancelled.
type flights struct {
	mu      sync.Mutex
	running map[string]*flight
	wg      sync.WaitGroup
}

type flight struct {
	cancel  context.CancelFunc
	waiting int           // guarded by flights.mu
	done    chan struct{} // closed when value and err are set
	value   string
	err     error
}

// do runs f, or joins who does already. f's context belongs to parent, and
// keeps the values of the first caller's.
func (fs *flights) do(ctx, parent context.Context, key string, f func(context.Context) (string, error)) (string, error) {
	fs.mu.Lock()
	if parent.Err() != nil {
		fs.mu.Unlock()
		return "", errClosed
	}
	fl := fs.running[key]
	if fl == nil {
		fctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		stop := context.AfterFunc(parent, cancel)
		fl = &flight{cancel: cancel, done: make(chan struct{})}
		if fs.running == nil {
			fs.running = make(map[string]*flight)
		}
		fs.running[key] = fl
		fs.wg.Go(func() {
			defer stop()
			defer cancel()
			fl.value, fl.err = f(fctx)
			fs.mu.Lock()
			fs.forget(key, fl)
			fs.mu.Unlock()
			close(fl.done)
		})
	}
	fl.waiting++
	fs.mu.Unlock()

	select {
	case <-fl.done:
		return fl.value, fl.err
	case <-ctx.Done():
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fl.waiting--; fl.waiting == 0 {
		// Whoever comes now begins anew, and does not join what is being cancelled.
		fs.forget(key, fl)
		fl.cancel()
	}
	return "", ctx.Err()
}

func (fs *flights) forget(key string, fl *flight) {
	if fs.running[key] == fl {
		delete(fs.running, key)
	}
}

// wait returns once every execution has ended. The parent context has ended
// before: none begins any more.
func (fs *flights) wait() {
	fs.mu.Lock() // a do that saw the parent alive has added its execution
	fs.mu.Unlock()
	fs.wg.Wait()
}
