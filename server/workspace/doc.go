// Package workspace brings each workspace's container to what its record asks
// for.
//
// One actor owns each workspace's containers; while there is something to do it
// has a goroutine. A change is
// committed by the store, which then calls Supervisor.OnCommit: the actor's kick,
// a channel of size 1, is the pending flag in memory; the truth is on disk,
// generation > observed_generation. The actor takes the token, THEN reads. So
// whatever comes while a cycle is in flight leads to exactly one more.
//
// Each wake runs passes. A pass reads the record, asks the runtime what is
// there, lets the pure decide choose one effect, does it, and records it. A crash
// between any two of them leaves a state that decide knows. A cycle is three of
// these effects: prepare (make a standby while the old container runs), switch
// (end the old one, read the secrets, start the standby) and remove.
//
// docs/architecture.md draws the states and has decide's table.
package workspace
