package workspace

// The steps that an actor does itself, beside those of store and runtime, in
// the order of a cycle. Config.Around does each of them.
const (
	stepSecretsRead    = "secrets.read"    // every secret is opened before anything is touched
	stepSecretsLate    = "secrets.late"    // the values that the container gets
	stepRecordStarting = "record.starting" // a cycle begins
	stepRecordObserved = "record.observed" // the container runs
	stepRecordExit     = "record.exit"     // it ended by itself
	stepRecordStopped  = "record.stopped"  // it was ended
	stepRecordFailure  = "record.failure"  // the cycle failed
	stepRecordSettled  = "record.settled"  // the status speaks of nothing that is over
	stepRecordDeleted  = "record.deleted"  // nothing is left but the record
)

// Steps are the names of all steps.
var Steps = []string{
	stepSecretsRead, stepSecretsLate,
	stepRecordStarting, stepRecordObserved, stepRecordExit, stepRecordStopped, stepRecordFailure, stepRecordSettled, stepRecordDeleted,
}
