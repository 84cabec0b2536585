package ctrd

import "time"

// LimitDeadlines makes each of the driver's own deadlines limit at most, so that
// what hangs does so no longer. It is called before the driver is used.
func (d *Driver) LimitDeadlines(limit time.Duration) {
	for _, deadline := range []*time.Duration{
		&d.deadlines.pull, &d.deadlines.unpack, &d.deadlines.prepare, &d.deadlines.task, &d.deadlines.ready, &d.deadlines.start,
		&d.deadlines.list, &d.deadlines.inspect, &d.deadlines.remove, &d.deadlines.kill, &d.deadlines.exit,
	} {
		*deadline = min(*deadline, limit)
	}
}
