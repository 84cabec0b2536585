/*
 * The protocol between those who change a workspace and its actor: commit,
 * kick, take the token, read, start, record, with crashes between any two steps.
 *
 * What is on disk or in the kernel survives a crash: generation, observed,
 * parked, running. What is in memory does not: the kick channel, the standby,
 * and what the actor has read.
 *
 * Each mutant below is an order that somebody could think harmless. check.sh
 * demands that the protocol holds and that each mutant breaks it.
 */

#ifndef CHANGES
#define CHANGES 1  /* saves of each of two callers */
#endif
#ifndef CRASHES
#define CRASHES 2  /* kill -9 of the daemon */
#endif

/* On disk, or in the kernel. */
byte generation = 1;  /* CreateWorkspace made 1 */
byte observed = 0;    /* the generation on record as running */
byte running = 0;     /* the generation that the container was started with; 0: none runs */
bool parked = false;

/* In memory. */
chan kick = [1] of { bit };
bool standby = false;
byte epoch = 0;       /* the daemon's incarnation: whose steps still count */
bool down = false;    /* crashed, and not up again */

#ifdef MUTANT_TRYLOCK
bool busy = false;    /* the lock: held from the token on until the actor rests */
#define LOCK busy = true;
#define UNLOCK ACT busy = false PETS;
#else
#define LOCK
#define UNLOCK
#endif

/* What the checks look at. */
byte acked = 1;       /* the highest generation that a caller has an answer for */
byte cycles = 0;      /* since the last commit, or crash, or exit */
byte atEnd = 0;       /* the newest generation when the old container had ended */
byte started = 0;     /* the newest generation that a container was ever started with */

inline hint() {
	if
	:: nfull(kick) -> kick!1
	:: full(kick) -> skip /* the actor will look anyway */
	fi
}

/* A step of a call that the incarnation me of the daemon serves: atomic, and
 * only while that one lives. */
#define STEP(me) atomic { if :: me == epoch -> skip :: else -> goto dead fi;
#define PETS     ; INVARIANT }
/* A step of the actor; after a crash the next one is that of its successor. */
#define ACT      atomic { if :: !down -> skip :: else -> goto boot fi;

/* True after every step: nothing is on record that was not started, nothing was
 * started that was not committed, and after a change at most two cycles follow:
 * the one in flight and one more. */
#define INVARIANT \
	assert(observed <= started && started <= generation && acked <= generation); \
	assert(cycles <= 2)

/* A save: SetSecret, SetModel and the like. */
active [2] proctype Change() {
	byte me, mine, saves = CHANGES;
	do
	:: saves > 0 ->
		saves--;
		me = epoch;
#ifdef MUTANT_KICK_BEFORE_COMMIT
		STEP(me) hint() PETS;
		STEP(me) generation++; mine = generation; cycles = 0 PETS;
#else
		STEP(me) generation++; mine = generation; cycles = 0 PETS;
#ifdef MUTANT_TRYLOCK
		/* The system that workspaced replaces: who finds the actor busy goes away. */
		STEP(me) if :: !busy -> hint() :: else -> skip fi PETS;
#else
		STEP(me) hint() PETS;
#endif
#endif
		STEP(me) if :: mine > acked -> acked = mine :: else -> skip fi PETS;
		goto next;
dead:
		skip; /* no answer: the caller can't know, and may save again */
next:
		me = 0; mine = 0
	:: saves == 0 -> break
	od
}

/* StopWorkspace, then StartWorkspace. */
active proctype Park() {
	byte me = epoch;
	STEP(me) parked = true; cycles = 0 PETS;
	STEP(me) hint() PETS;
	STEP(me) parked = false; generation++; cycles = 0 PETS;
	STEP(me) hint() PETS;
dead:
	skip
}

/* The container ends by itself, once; the exit watch kicks. */
active proctype Exit() {
end_never:
	atomic { running > 0 -> running = 0; cycles = 0; hint() }
}

active proctype Actor() {
	byte read, snapshot;
	bool resting;
boot:
	atomic { down = false; read = 0; snapshot = 0; resting = false };
#ifndef MUTANT_NO_LOOK_AT_BOOT
	ACT hint() PETS;
#endif

rest:
#ifdef MUTANT_READ_BEFORE_TOKEN
	/* Reads, then takes the token: what was committed between is lost. */
end_idle:
	atomic { if :: down -> goto boot :: !down && nempty(kick) -> skip fi };
	ACT read = generation; resting = parked PETS;
	ACT kick?_ PETS;
	goto decide;
#else
	UNLOCK
end_idle:
	atomic { if :: down -> goto boot :: !down && nempty(kick) -> kick?_; LOCK fi };
#endif

look:
	ACT read = generation; resting = parked PETS;
decide:
	if
	:: resting ->
		ACT standby = false; running = 0 PETS;
		goto rest
	:: !resting && running > observed -> /* started, and then a crash before the record */
		ACT observed = running PETS;
		goto look
	:: !resting && running <= observed && running > 0 && read <= observed ->
		goto rest
	:: else -> skip
	fi;

	/* A cycle: prepare, */
	ACT standby = true; cycles++ PETS;
#ifdef MUTANT_EARLY_READ
	snapshot = read;
#endif
	/* switch, */
	ACT running = 0; atEnd = generation PETS;
#ifndef MUTANT_EARLY_READ
	ACT snapshot = generation; resting = parked PETS;
	if
	:: resting -> goto look
	:: else -> skip
	fi;
#endif
#ifdef MUTANT_RECORD_BEFORE_START
	ACT observed = snapshot PETS;
#endif
	ACT assert(snapshot >= atEnd); /* late binding */
		running = snapshot; started = snapshot; atEnd = 0; standby = false PETS;
#ifdef MUTANT_RECORD_NEWEST
	/* Records what is newest now instead of what was read. */
	ACT observed = generation PETS;
#endif
	ACT observed = snapshot PETS;
	goto look
}

/* kill -9 at any moment; the daemon comes back. */
active proctype Crash() {
	byte n = 0;
end_no_more:
	do
	:: n < CRASHES && !down ->
		atomic {
			n++;
			epoch++;
			down = true;
			standby = false;
			cycles = 0;
			if :: nempty(kick) -> kick?_ :: empty(kick) -> skip fi
		}
	od
}

/* Once nothing can happen any more, what runs is the newest generation, it is on
 * record, and so whatever was acknowledged is inside. */
active proctype Finally() {
end_never:
	timeout ->
	assert(acked <= generation);
	assert(!parked -> (running == generation && observed == generation) : running == 0);
	assert(!standby)
}

