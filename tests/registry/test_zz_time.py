import time, pytest
def test_time(postgresql_databases):
    db=postgresql_databases
    for strat in ("WAL_LOG","FILE_COPY","WAL_LOG","FILE_COPY"):
        t=time.time()
        for i in range(5): db.execute(f"CREATE DATABASE y{i} TEMPLATE migrated STRATEGY {strat}")
        a=time.time()
        for i in range(5): db.execute(f"DROP DATABASE y{i} WITH (FORCE)")
        print(strat,(a-t)/5,(time.time()-a)/5)
